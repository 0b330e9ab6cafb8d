// Log-sum-exp in one pass: a running maximum and the sum of exponentials below it.
#pragma once
#include <cfloat>

#include "di4c/exp.h"
#include "group.cuh"
#include "row.cuh"

namespace di4c::cuda {

struct Online {
  float max = -FLT_MAX;  // not -inf: then -inf less the maximum is -inf, never NaN
  float sum = 0.0f;      // NaN as soon as a NaN or a +inf was seen

  template <int kN>
  __device__ __forceinline__ void add(const float (&x)[kN]) {
    float top = x[0];
#pragma unroll
    for (int i = 1; i < kN; ++i) top = fmaxf(top, x[i]);
    if (top > max) {
      sum *= exp_nonpos(max - top);
      max = top;
    }
    float part = 0.0f;
#pragma unroll
    for (int i = 0; i < kN; ++i) part += exp_nonpos(x[i] - max);
    sum += part;
  }

  __device__ __forceinline__ void add(float x) {
    const float one[1] = {x};
    add(one);
  }

  // -inf where nothing has mass, NaN where anything was NaN or +inf.
  __device__ __forceinline__ float log() const { return sum == sum ? max + logf(sum) : NAN; }

  __device__ __forceinline__ Online merged(const Group& group) const {
    Online all;
    all.max = group.max(max);
    all.sum = group.sum(sum * exp_nonpos(max - all.max));
    return all;
  }

  __device__ __forceinline__ Online merged_in_warp() const {
    Online all;
    all.max = warp_max(max);
    all.sum = warp_sum(sum * exp_nonpos(max - all.max));
    return all;
  }
};

// A row's log-sum-exp in two parts, max + log_sum: x - max loses nothing where it matters, wherever the row lies.
struct Norm {
  float max, log_sum;

  __device__ __forceinline__ float log_prob(float x) const { return (x - max) - log_sum; }

  // Row i's place in the two planes of api.h; `rows` is the size of a plane.
  __device__ __forceinline__ void keep(float* planes, int64_t rows, int64_t i) const {
    planes[i] = max;
    planes[rows + i] = log_sum;
  }

  static __device__ __forceinline__ Norm kept(const float* planes, int64_t rows, int64_t i) {
    return {planes[i], planes[rows + i]};
  }
};

// The normaliser of a row, in every thread of the group. A row that is no distribution (NaN, +inf, all -inf)
// gives NaN, which every value computed from it inherits.
template <class AnyOrTypedRow>
__device__ __forceinline__ Norm row_norm(const AnyOrTypedRow& row, int64_t head, int64_t S, const Group& group) {
  Online mine;
  sweep(head, S, group.rank, group.size, [&](int64_t s, auto width) {
    float x[decltype(width)::value];
    row.load(s, x);
    mine.add(x);
  });
  const Online all = mine.merged(group);
  return {all.max, all.sum > 0.0f ? logf(all.sum) : NAN};
}

// Over the `count` components of (b, d), whose normalisers lse (2, B, count, D) keeps, and the classes s .. s + kN:
// max = max_l log p_l, sum = sum_l p_l / exp(max). A class that underflows in every component keeps its shares; sum is
// 0 where none has mass.
template <class RowType, int kN>
__device__ __forceinline__ void log_components(const Logits& x, const float* lse, int64_t B, int64_t count, int64_t D,
                                               int64_t b, int64_t d, int64_t s, float (&max)[kN], float (&sum)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    max[i] = -FLT_MAX;
    sum[i] = 0.0f;
  }
  for (int64_t l = 0; l < count; ++l) {
    float v[kN];
    RowType(x, b, l, d).load(s, v);
    const Norm norm = Norm::kept(lse, B * count * D, (b * count + l) * D + d);
#pragma unroll
    for (int i = 0; i < kN; ++i) {  // one exponential a class: of the old maximum or of the new value
      const float log_prob = norm.log_prob(v[i]), gap = log_prob - max[i];
      const float e = exp_nonpos(-fabsf(gap));
      sum[i] = gap > 0.0f ? sum[i] * e + 1.0f : sum[i] + e;
      max[i] = gap > 0.0f ? log_prob : max[i];
    }
  }
}

}  // namespace di4c::cuda
