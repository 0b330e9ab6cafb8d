// The K tokens of one position against its L rows, K padded to whole vectors so that loops over k need no tail.
#pragma once
#include "mixture.h"

namespace di4c::cpu::DI4C_ISA {

struct Tokens {
  int64_t K = 0, Kp = 0;
  int64_t* token = nullptr;  // (Kp): x_k^d, 0 for one that is no class
  bool* outside = nullptr;   // (Kp): that is no class
  float* x = nullptr;        // (L, Kp): the logits there

  Tokens() = default;

  static int64_t pad(int64_t K) { return ceil_div(K, W) * W; }
  Tokens(Arena& arena, int64_t L, int64_t count)
      : K(count), Kp(pad(count)), token(arena.take<int64_t>(Kp)), outside(arena.take<bool>(Kp)),
        x(arena.take<float>(L * Kp)) {}

  // The tokens at position d, which lie D apart in memory: read once for all rows.
  template <typename Args>
  void find(const Args& args, int64_t b, int64_t d) const {
    for (int64_t k = 0; k < K; ++k) {
      const int64_t found = args.tokens[(b * K + k) * args.D + d];
      outside[k] = found < 0 || found >= args.S;
      token[k] = outside[k] ? 0 : found;
    }
    for (int64_t k = K; k < Kp; ++k) token[k] = 0, outside[k] = false;
  }

  // Row l's logits at the tokens; `floats` is the row as floats where the caller has it, else null.
  void gather(int64_t l, const Row& row, const float* floats) const {
    float* to = x + l * Kp;
    if (row.dtype == kFloat32) floats = static_cast<const float*>(row.data);
    if (floats) {
      for (int64_t k = 0; k < Kp; ++k) to[k] = floats[token[k]];
    } else if (row.dtype == kLogistic) {
      for (int64_t k = 0; k < Kp; ++k) to[k] = read_one(row, token[k]);
    } else {
      const uint16_t* from = static_cast<const uint16_t*>(row.data);
      for (int64_t k = 0; k < Kp; k += W) {
        u16 halves;
        for (int i = 0; i < W; ++i) halves[i] = from[token[k + i]];
        store(to + k, row.dtype == kBFloat16 ? from_bfloat16(halves) : from_float16(halves));
      }
    }
  }
};

}  // namespace di4c::cpu::DI4C_ISA
