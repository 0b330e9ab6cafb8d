// Fixed-point masses: how 128 random bits choose a class.
//
// A row of S logits x (already divided by the temperature) is cut into chunks of kChunk classes, chunk c
// holding the classes [c kChunk, (c+1) kChunk). Per chunk, m_c = max x and s_c = sum exp(x - m_c).
//   1. chunk:  M = max m_c,  v_c = s_c exp(m_c - M),  W_c = floor(v_c 2^k), k so that sum v lies in [2^61, 2^62)
//              once scaled; the first 64 bits pick a chunk in proportion to W_c.
//   2. class:  q_i = floor(exp(x_i - m_c) 2^53); the second 64 bits pick a class in proportion to q_i.
// Integer prefix sums are exact and monotone: a class of mass 0 can never be drawn, the choice does not
// depend on the order of summation, and tails are right to 2^-53 of their chunk's largest class.
#pragma once
#include "di4c/exp.h"
#include "di4c/philox.h"

namespace di4c {

// A drawn token is >= 0; these take its place where a row allows none.
constexpr int64_t kBadRow = -1;  // the row holds a NaN, or no class has mass (all -inf)

// 2^e as a double, for the exponents used here (|e| < 1000).
DI4C_FN double pow2(int e) {
  const uint64_t bits = static_cast<uint64_t>(1023 + e) << 52;
  double v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

// floor(log2 v) of a normal positive double.
DI4C_FN int exponent(double v) {
  uint64_t bits;
  memcpy(&bits, &v, sizeof bits);
  return static_cast<int>(bits >> 52 & 0x7ff) - 1023;
}

// v_c: the mass of a chunk relative to the row's maximum.
DI4C_FN double chunk_value(float sum, float chunk_max, float row_max) {
  return static_cast<double>(sum) * static_cast<double>(exp_nonpos(chunk_max - row_max));
}

// The scale that carries the values' total into [2^61, 2^62).
DI4C_FN double chunk_scale(double total) { return pow2(61 - exponent(total)); }

DI4C_FN uint64_t chunk_mass(double value, double scale) { return static_cast<uint64_t>(value * scale); }

// floor(e 2^53) of a float in [0, 1], by shifting its bits: on GPUs a conversion to double and back costs far more.
DI4C_FN uint64_t fixed_point(float e) {
  uint32_t bits;
  memcpy(&bits, &e, sizeof bits);
  const int shift = static_cast<int>(bits >> 23) - 97;  // 53 less what a float's last bit counts for
  const uint64_t digits = (bits & 0x7fffffu) | 0x800000u;
  return shift >= 0 ? digits << shift : shift > -24 ? digits >> -shift : 0;
}

// q_i <= 2^53; a chunk of 1024 of them stays within 2^63.
DI4C_FN uint64_t class_mass(float x, float chunk_max) { return fixed_point(exp_nonpos(x - chunk_max)); }

}  // namespace di4c
