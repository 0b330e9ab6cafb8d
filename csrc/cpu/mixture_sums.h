// The one reading of a row: its normaliser and, kept on the way, its exponentials relative to the largest logit of each
// chunk of kChunk, which become probabilities by a factor per chunk.
#pragma once
#include "mixture.h"

namespace di4c::cpu::DI4C_ISA {

struct RowSum {
  float max;
  double sum;  // of exp(x - max), >= 1; NaN for a bad row
};

// Sum of exp(x - m), each stored on the way; 0 is stored past x[n).
static inline float keep_exp(const float* x, int n, float m, float* e) {
  const f32 shift = set(m == -kInf ? 0.0f : m);
  f32 s[U] = {};
  each(x, n, -kInf, DI4C_EACH(int u, int i, int, f32 v) {
    const f32 now = exp_nonpos(v - shift);
    store(e + i, now);
    s[u] += now;
  });
  return sum_block(s);
}

// Fills chunk_max (one a chunk) and, unless null, e (S, padded); f(start, n, x, m) sees every chunk of logits.
template <typename F>
static inline RowSum sum_row(const Row& row, float* buffer, float* e, float* chunk_max, const F& f) {
  float top = -kInf, sums[kMaxChunks + W];
  const int64_t count = ceil_div(row.S, kChunk);
  sums[0] = 0;
  for (int64_t c = 0; c < count; ++c) {
    const int64_t start = c * kChunk;
    const int n = min_int(row.S - start, kChunk);
    const float* x = read(row, start, n, buffer);
    const float m = max_of(x, n);
    sums[c] = e ? keep_exp(x, n, m, e + start) : sum_exp(x, n, m);
    chunk_max[c] = m;
    if (m > top) top = m;
    f(start, n, x, m);
  }
  if (count == 1) return {top, sums[0] > 0 ? sums[0] : __builtin_nan("")};
  double sum = 0;
  for (int64_t c = 0; c < count; c += W) {
    float value[W];
    const int n = min_int(count - c, W);
    store(value, load(sums + c, n, 0.0f) * exp_nonpos(load(chunk_max + c, n, 0.0f) - top));
    for (int i = 0; i < n; ++i)
      if (sums[c + i] != 0) sum += value[i];
  }
  return {top, sum > 0 ? sum : __builtin_nan("")};
}

// From the chunks' maxima: what makes a probability of an exponential kept, times `scale`.
static inline void chunk_factors(float* chunk_max, int64_t count, Norm norm, float scale) {
  for (int64_t c = 0; c < count; c += W) {
    const int n = min_int(count - c, W);
    store(chunk_max + c, n, exp_nonpos(load(chunk_max + c, n, 0.0f) - norm.max - norm.log_sum) * scale);
  }
}

// The mean probabilities of one position's rows into `out` (S, padded), and their normalisers. `one`: as large as out.
static inline void mean_probabilities(const Rows& rows, int64_t S, float* buffer, float* one, float* out) {
  float factor[kMaxChunks];
  const int64_t count = ceil_div(S, kChunk);
  const float scale = 1.0f / static_cast<float>(rows.count);
  for (int64_t i = 0; i < rows.count; ++i) {
    float* e = i == 0 ? out : one;
    const RowSum sum = sum_row(rows.row[i], buffer, e, factor, [](int64_t, int, const float*, float) {});
    rows.norm[i] = {sum.max, static_cast<float>(log_from_one(set(sum.sum))[0])};
    chunk_factors(factor, count, rows.norm[i], scale);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t end = S < (c + 1) * kChunk ? S : (c + 1) * kChunk;
      const f32 by = set(factor[c]);
      for (int64_t j = c * kChunk; j < end; j += W)
        store(out + j, i == 0 ? load(e + j) * by : fma(load(e + j), by, load(out + j)));
    }
  }
}

}  // namespace di4c::cpu::DI4C_ISA
