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
static inline float keep_exp(const float* x, int n, float m, float* e, Soon ask) {
  const f32 shift = set(m == -kInf ? 0.0f : m);
  f32 s[U] = {};
  each(x, n, -kInf, DI4C_EACH(int u, int i, int, f32 v) {
    ask(i);
    const f32 now = exp_nonpos(v - shift);
    store(e + i, now);
    s[u] += now;
  });
  return sum_block(s);
}

// From a row's chunks: their maxima, the largest of those, and the sums relative to each.
static inline RowSum combine(const float* chunk_max, const float* sums, int64_t count, float top) {
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

// Fills chunk_max (one a chunk) and, unless null, e (S, padded); f(start, n, x, m) sees every chunk of logits. `next`:
// what is read after the row.
template <typename F>
static inline RowSum sum_row(const Row& row, float* buffer, float* e, float* chunk_max, Soon next, const F& f) {
  float top = -kInf, sums[kMaxChunks + W];
  const int64_t count = ceil_div(row.S, kChunk);
  sums[0] = 0;
  for (int64_t c = 0; c < count; ++c) {
    const int64_t start = c * kChunk;
    const int n = min_int(row.S - start, kChunk);
    const float* x = read(row, start, n, buffer);
    const float m = max_of(x, n);
    const Soon ask = c + 1 < count ? soon(row, start + kChunk) : next;
    sums[c] = e ? keep_exp(x, n, m, e + start, ask) : sum_exp(x, n, m, ask);
    chunk_max[c] = m;
    if (m > top) top = m;
    f(start, n, x, m);
  }
  return combine(chunk_max, sums, count, top);
}

// Two rows at once, or one, where nothing but the normaliser is wanted: one's maximum is found under the other's
// exponentials. `floats` is left pointing at each row's last chunk; buffers hold kChunk each. Not for logistic rows.
template <int N>
static inline void sum_rows(const Row* const (&rows)[N], float* const (&buffers)[N], const Soon (&next)[N],
                            RowSum (&found)[N], const float* (&floats)[N]) {
  float chunk_max[N][kMaxChunks + W], sums[N][kMaxChunks + W], top[N];
  const int64_t S = rows[0]->S, count = ceil_div(S, kChunk);
  for (int r = 0; r < N; ++r) top[r] = -kInf;
  for (int64_t c = 0; c < count; ++c) {
    const int n = min_int(S - c * kChunk, kChunk);
    f32 shift[N], s[N][U] = {};
    Soon ask[N];
    for (int r = 0; r < N; ++r) {
      ask[r] = c + 1 < count ? soon(*rows[r], (c + 1) * kChunk) : next[r];
      const float m = read_max(*rows[r], c * kChunk, n, buffers[r], floats[r]);
      chunk_max[r][c] = m;
      if (m > top[r]) top[r] = m;
      shift[r] = set(m == -kInf ? 0.0f : m);
    }
    int i = 0;
    for (; i + kLanes <= n; i += kLanes)
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u)
#pragma GCC unroll 2
        for (int r = 0; r < N; ++r) {
          ask[r](i + u * W);
          s[r][u] += exp_nonpos(load(floats[r] + i + u * W) - shift[r]);
        }
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u, i += W)
      for (int r = 0; r < N && i < n; ++r) s[r][u] += exp_nonpos(load(floats[r] + i, n - i, -kInf) - shift[r]);
    for (int r = 0; r < N; ++r) sums[r][c] = sum_block(s[r]);
  }
  for (int r = 0; r < N; ++r) found[r] = combine(chunk_max[r], sums[r], count, top[r]);
}

// From the chunks' maxima: what makes a probability of an exponential kept, times `scale`.
static inline void chunk_factors(float* chunk_max, int64_t count, Norm norm, float scale) {
  for (int64_t c = 0; c < count; c += W) {
    const int n = min_int(count - c, W);
    store(chunk_max + c, n, exp_nonpos(load(chunk_max + c, n, 0.0f) - norm.max - norm.log_sum) * scale);
  }
}

// The mean probabilities of one position's rows into `out` (S, padded), and their normalisers. `one`: as large as out;
// `next`: as for Rows::ahead.
static inline void mean_probabilities(const Rows& rows, int64_t S, int64_t next, float* buffer, float* one,
                                      float* out) {
  float factor[kMaxChunks];
  const int64_t count = ceil_div(S, kChunk);
  const float scale = 1.0f / static_cast<float>(rows.count);
  for (int64_t i = 0; i < rows.count; ++i) {
    float* e = i == 0 ? out : one;
    const Soon ask = rows.ahead(i, 0, S, next);
    const RowSum sum = sum_row(rows.row[i], buffer, e, factor, ask, [](int64_t, int, const float*, float) {});
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
