// Select and reveal: which masked positions of a sample take their tokens next.
//
// A position's confidence is log p + noise g, where g is a Gumbel number of 64 random bits. Of the masked
// positions those of the highest confidence are revealed, the first of equals. Every operation is an IEEE product, sum
// or fma and one of log.h, so all backends choose the same positions to the last one. A confidence that is NaN, or a
// token below 0, is no candidate: what stands there becomes kBadToken and nothing else hangs on it.
//
// Candidates are ordered by integers that are all different, larger = sooner: 32 bits of the confidence, then the
// position from the end. The least of those revealed is found by 8 bits at a time, from the highest.
#pragma once
#include "di4c/log.h"
#include "di4c/philox.h"

namespace di4c {

constexpr int64_t kBadToken = -1;
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits, kOrderBits = 64;

// -log(-log(1 - v)), v the middle of one of 2^52 equal parts of (0, 1): both tails to all digits of a float.
DI4C_FN float gumbel(uint64_t bits) {
  const double v = (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52;
  const float exponential =
      v < 0.29 ? -log_beside_one(-static_cast<float>(v)) : -log_normal(static_cast<float>(1.0 - v));
  return -log_normal(exponential);
}

// Ordered as the confidences are, and above 0; 0 for NaN.
DI4C_FN uint32_t confidence_order(float log_prob, float noise, uint64_t bits) {
#if defined(__CUDA_ARCH__)
  float c = __fadd_rn(__fadd_rn(log_prob, __fmul_rn(noise, gumbel(bits))), 0.0f);
#else
  float c = log_prob + noise * gumbel(bits) + 0.0f;  // -0 becomes +0
#endif
  if (!(c == c)) return 0;
  uint32_t order;
  memcpy(&order, &c, sizeof order);
  return order & 0x80000000u ? ~order : order | 0x80000000u;
}

DI4C_FN uint64_t reveal_order(uint32_t confidence, int64_t position) {
  return uint64_t{confidence} << 32 | static_cast<uint32_t>(~position);
}

}  // namespace di4c
