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

  // The tokens at position d, which lie apart in memory: read once for all rows.
  template <typename Args>
  void find(const Args& args, int64_t b, int64_t d) const {
    for (int64_t k = 0; k < K; ++k) {
      const int64_t found = token_of(args, b, k, d);
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

  // coefficient_lk in place of the logits at the tokens; their sums over k are taken off slope (L).
  void weigh(const MixtureBackwardArgs& args, int64_t b, float w, const Norm* norm, float* slope) const {
    const int64_t L = args.L;
    for (int64_t k = 0; k < K; k += W) {
      const int n = min_int(K - k, W);
      f32 top = set(-kInf), sum = {};
      for (int64_t l = 0; l < L; ++l) {
        float* to = x + l * Kp + k;
        const f32 a = load(to) - norm[l].max - norm[l].log_sum;
        store(to, a);
        top = (a > top) | (a != a) ? a : top;
      }
      for (int64_t l = 0; l < L; ++l) {
        float* to = x + l * Kp + k;
        const f32 now = exp_nonpos(load(to) - top);
        store(to, now);
        sum += now;
      }
      // A value of -inf has no gradient.
      const f32 joint = load(args.joint + b * K + k, n, 0.0f), own = load(args.correlation + b * K + k, n, 0.0f);
      const f32 gj = joint == -kInf ? f32{} : load(args.grad_joint + b * K + k, n, 0.0f);
      const f32 gc = own == -kInf ? f32{} : load(args.grad_correlation + b * K + k, n, 0.0f);
      const f32 both = gj + gc, inverse = gc / sum;
      for (int64_t l = 0; l < L; ++l) {
        float* to = x + l * Kp + k;
        const f32 share = load(args.share + (b * L + l) * K + k, n, 0.0f);
        store(to, top == -kInf ? f32{} : w * (both * share - inverse * load(to)));
      }
    }
    for (int64_t l = 0; l < L; ++l) {
      f32 sum[U] = {};  // what is padded is 0
      for (int64_t k = 0; k < Kp; k += W) sum[k / W % U] += load(x + l * Kp + k);
      slope[l] -= sum_block(sum);
    }
  }

  // The tokens in the order of the strips of columns that they lie in: those of strip i are order[first[i] ..
  // first[i + 1]].
  void deal(int columns, int strips, int64_t* first, int64_t* order) const {
    for (int strip = 0; strip <= strips; ++strip) first[strip] = 0;
    for (int64_t k = 0; k < K; ++k) ++first[token[k] / columns + 1];
    for (int strip = 0; strip < strips; ++strip) first[strip + 1] += first[strip];
    for (int64_t k = K; k-- > 0;) order[--first[token[k] / columns + 1]] = k;
    for (int strip = 0; strip < strips; ++strip) first[strip] = first[strip + 1];
    first[strips] = K;
  }

  // What tokens order[begin .. end] bring to a row, onto its elements from `start` on.
  void add(int64_t begin, int64_t end, const int64_t* order, const float* brought, int64_t start, float* piece) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = order[i];
      if (!outside[k]) piece[token[k] - start] += brought[k];
    }
  }
};

}  // namespace di4c::cpu::DI4C_ISA
