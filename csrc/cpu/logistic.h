// Logistic rows (di4c/logistic.h), W classes at a time: their logits, and the sums their gradient comes down to.
#pragma once
#include "di4c/logistic.h"
#include "vec.h"

namespace di4c::cpu::DI4C_ISA {

struct LogisticBins {  // of W classes, as LogisticBin
  f32 r, l, e, a, b;
};

// n = 2 i - S for the W classes i from `start` on.
static inline f32 logistic_numbers(const LogisticRow& row, int64_t start) {
  f32 n;
  for (int j = 0; j < W; ++j) n[j] = static_cast<float>(2 * j);
  return n + static_cast<float>(2 * start - row.S);
}

template <bool kWide>
static inline __attribute__((always_inline)) LogisticBins logistic_bins(const LogisticRow& row, f32 n) {
  const f32 k = set(row.k), rest = set(-row.rest), one = set(1.0f);
  LogisticBins bin;
  bin.r = fma((n + 2.0f) - row.centre, k, rest);
  bin.e = exp_nonpos(-abs(bin.r));
  if constexpr (kWide) {
    bin.l = fma(n - row.centre, k, rest);
    const f32 f = exp_nonpos(-abs(bin.l));
    bin.a = bin.l <= 0.0f ? one : f;
    bin.b = bin.l <= 0.0f ? f : one;
  } else {
    bin.l = fma(set(-2.0f), k, bin.r);
    bin.a = bin.r <= 0.0f ? one : bin.e;
    bin.b = bin.r <= 0.0f ? bin.e * row.c : set(row.c);
  }
  return bin;
}

// kVectors vectors of logits, stage by stage: one alone is a long chain of operations that wait for each other.
template <bool kWide, int kVectors>
static inline __attribute__((always_inline)) void logistic_block(const LogisticRow& row, f32 n, float* out) {
  LogisticBins v[kVectors];
  f32 ratio[kVectors];
#pragma GCC unroll 8
  for (int u = 0; u < kVectors; ++u) v[u] = logistic_bins<kWide>(row, n + static_cast<float>(2 * W * u));
#pragma GCC unroll 8
  for (int u = 0; u < kVectors; ++u) {
    const f32 sum = v[u].a + v[u].b;
    ratio[u] = fma(v[u].a, set(row.q), kLogisticFloor * sum) / (sum * (1.0f + v[u].e));
  }
#pragma GCC unroll 8
  for (int u = 0; u < kVectors; ++u) store(out + u * W, (v[u].r < 0.0f ? v[u].r : f32{}) + log_normal(ratio[u]));
}

template <bool kWide>
static inline void logistic_logits(const LogisticRow& row, int64_t start, int n, float* out) {
  constexpr int kVectors = 4;
  const f32 first = logistic_numbers(row, start);
  int i = 0;
  for (; i + kVectors * W <= n; i += kVectors * W)
    logistic_block<kWide, kVectors>(row, first + static_cast<float>(2 * i), out + i);
  for (; i < n; i += W) logistic_block<kWide, 1>(row, first + static_cast<float>(2 * i), out + i);
}

// Logits [start, start + n) into `out`, which holds n rounded up to W. Long, and called by the row: not inlined.
static __attribute__((noinline, unused)) void logistic_logits(const LogisticRow& row, int64_t start, int n,
                                                              float* out) {
  if (row.wide)
    logistic_logits<true>(row, start, n, out);
  else
    logistic_logits<false>(row, start, n, out);
}

// A row's gradient: sum over classes of g dx/dmean and g dx/dlog_scale.
struct LogisticSum {
  double mean, log_scale;
};

template <bool kWide>
static inline void logistic_pull(const LogisticRow& row, int64_t start, int n, const float* g, LogisticSum& sum) {
  f32 about_mean[U] = {}, about_scale[U] = {};
  const f32 first = logistic_numbers(row, start), one = set(1.0f);
  for (int i = 0; i < n; i += kLanes) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      const int at = i + u * W;
      if (at >= n) break;
      const LogisticBins v = logistic_bins<kWide>(row, first + static_cast<float>(2 * at));
      const f32 gradient = load(g + at, n - at, 0.0f), both = v.a + v.b, tail = 1.0f + v.e;
      const f32 mass = fma(v.a, set(row.q), kLogisticFloor * both), inverse = 1.0f / (mass * both * tail);
      const f32 share = v.a * (tail * inverse);
      const f32 A = (v.r <= 0.0f ? one : v.e) * (mass * both * inverse), B = -(row.q * v.b * share);
      about_mean[u] = fma(gradient, A + B, about_mean[u]);
      about_scale[u] = fma(gradient, fma(A, v.r, fma(B, v.l, both * share * row.dq)), about_scale[u]);
    }
  }
  sum.mean -= static_cast<double>(row.kappa) * sum_block(about_mean);
  sum.log_scale += static_cast<double>(row.log_scale_sign) * sum_block(about_scale);
}

// Adds what the gradients g[0..n) of the logits [start, start + n) contribute.
static __attribute__((noinline, unused)) void logistic_pull(const LogisticRow& row, int64_t start, int n,
                                                            const float* g, LogisticSum& sum) {
  if (row.wide)
    logistic_pull<true>(row, start, n, g, sum);
  else
    logistic_pull<false>(row, start, n, g, sum);
}

}  // namespace di4c::cpu::DI4C_ISA
