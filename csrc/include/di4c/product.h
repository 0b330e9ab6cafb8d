// Fixed-point masses of a product of two tables' rows: how 64 random bits choose among S classes given in doubles.
//
// v_s = left_s right_s + base, rounded after the product and after the sum. With e the exponent of the largest v,
//   q_s = floor(v_s 2^(P - e)),  P = 61 - ceil(log2 S),
// so that all of them together stay below 2^62; the bits pick a class in proportion to q_s: the first whose inclusive
// prefix sum exceeds floor(bits * total / 2^64). Products and shifts alone: every backend has the same q to the bit, a
// class of mass 0 can never be drawn, and tails are right to 2^-P of the largest class (2^-53 at S = 256).
#pragma once
#include "di4c/masses.h"

namespace di4c {

constexpr uint64_t kDoubleInf = uint64_t{0x7ff} << 52, kDoubleSign = uint64_t{1} << 63;

// The bits of v_s. Those of doubles >= 0 are ordered as the doubles are.
DI4C_FN uint64_t product_bits(double left, double right, double base) {
#if defined(__CUDA_ARCH__)
  const double v = __dadd_rn(__dmul_rn(left, right), base);
#else
  const double v = left * right + base;
#endif
  uint64_t bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}

// Whether a row allows no draw: some v_s is negative, infinite or NaN, or all are 0. `top` is the largest of their bits,
// `seen` all of them or-ed together.
DI4C_FN bool bad_product(uint64_t top, uint64_t seen) { return (seen & kDoubleSign) || top >= kDoubleInf || top == 0; }

// q_s = ((the 53 digits of v_s) << up) >> (down - exponent field of v_s).
struct ProductScale {
  int up, down;
};

// The exponent field; subnormals have that of the smallest normal number.
DI4C_FN int exponent_field(uint64_t bits) {
  const int field = static_cast<int>(bits >> 52);
  return field > 0 ? field : 1;
}

DI4C_FN ProductScale product_scale(uint64_t top, int64_t S) {
  int place = 61;  // P
  for (int64_t classes = 1; classes < S; classes *= 2) --place;
  const int up = place > 52 ? place - 52 : 0;
  return {up, exponent_field(top) + up + 52 - place};
}

DI4C_FN uint64_t product_mass(uint64_t bits, ProductScale scale) {
  const uint64_t digits = (bits & ((uint64_t{1} << 52) - 1)) | uint64_t{bits >> 52 != 0} << 52;
  const int shift = scale.down - exponent_field(bits);
  return shift > 63 ? 0 : (digits << scale.up) >> shift;
}

}  // namespace di4c
