// The one logarithm of the library, for normal x > 0: x = 2^e (1 + f), f in [sqrt 1/2 - 1, sqrt 2 - 1),
// log(1 + f) = f - f^2/2 + f^3 P(f), P of degree 7 fitted for least relative error. Every operation is an IEEE
// single-precision fma, product or sum, so CPU and GPU agree bit for bit. Largest relative error: 9e-8. NaN gives NaN.
// The vector form in cpu/vec.h is the same sequence of operations lane by lane.
#pragma once
#include "di4c/exp.h"

namespace di4c {

constexpr uint32_t kSqrtHalfBits = 0x3f3504f3u;
constexpr float kLogP0 = 0x1.555554p-2f, kLogP1 = -0x1.000226p-2f, kLogP2 = 0x1.99a008p-3f, kLogP3 = -0x1.547244p-3f;
constexpr float kLogP4 = 0x1.22da1cp-3f, kLogP5 = -0x1.0d8544p-3f, kLogP6 = 0x1.055b72p-3f, kLogP7 = -0x1.38b582p-4f;

// P, for which log(1 + f) = f - f^2/2 + f^3 P(f).
DI4C_FN float log_polynomial(float f) {
  float p = fmaf(kLogP7, f, kLogP6);
  p = fmaf(p, f, kLogP5);
  p = fmaf(p, f, kLogP4);
  p = fmaf(p, f, kLogP3);
  p = fmaf(p, f, kLogP2);
  p = fmaf(p, f, kLogP1);
  return fmaf(p, f, kLogP0);
}

// log(1 + f) for f in [sqrt 1/2 - 1, sqrt 2 - 1), to as many digits as f has.
DI4C_FN float log_beside_one(float f) {
#if defined(__CUDA_ARCH__)
  const float square = __fmul_rn(f, f);
#else
  const float square = f * f;
#endif
  return fmaf(fmaf(log_polynomial(f), f, -0.5f), square, f);
}

DI4C_FN float log_normal(float x) {
  if (!(x == x)) return x;
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t whole = (bits - kSqrtHalfBits) & 0xff800000u;
  const float e = static_cast<float>(static_cast<int32_t>(whole) >> 23);
  bits -= whole;
  float f;
  memcpy(&f, &bits, sizeof f);
  return fmaf(e, kLn2Hi, fmaf(e, kLn2Lo, log_beside_one(f - 1.0f)));
}

}  // namespace di4c
