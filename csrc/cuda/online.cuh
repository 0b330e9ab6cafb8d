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

  // What rounding took from log(): log() + lost() is the maximum and the logarithm together.
  __device__ __forceinline__ float lost() const {
    const float rest = logf(sum), whole = max + rest, part = whole - max;
    return (max - (whole - part)) + (rest - part);
  }

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

// A row's log-sum-exp as one float, and what its rounding lost: at |lse| = 200 that is 8e-6 of every probability.
struct RowLse {
  float value, lost;
};

// The log-sum-exp of a row, in every thread of the group. A row that is no distribution (NaN, +inf, all -inf)
// gives NaN, which every value computed from it inherits.
template <class AnyOrTypedRow>
__device__ __forceinline__ RowLse row_lse(const AnyOrTypedRow& row, int64_t head, int64_t S, const Group& group) {
  Online mine;
  sweep(head, S, group.rank, group.size, [&](int64_t s, auto width) {
    float x[decltype(width)::value];
    row.load(s, x);
    mine.add(x);
  });
  const Online all = mine.merged(group);
  if (!(all.sum > 0.0f)) return {NAN, NAN};
  return {all.log(), all.lost()};
}

// log sum over `count` components of softmax(x)[s .. s + kN), component l of (b, d) having log-sum-exp
// lse[l * lse_stride]. Stays in log space: a class that underflows in every component keeps its logarithm.
template <class RowType, int kN>
__device__ __forceinline__ void log_components(const Logits& x, int64_t count, int64_t b, int64_t d, const float* lse,
                                               int64_t lse_stride, int64_t s, float (&out)[kN]) {
  float max[kN], sum[kN];
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    max[i] = -FLT_MAX;
    sum[i] = 0.0f;
  }
  for (int64_t l = 0; l < count; ++l) {
    float v[kN];
    RowType(x, b, l, d).load(s, v);
    const float z = lse[l * lse_stride];
#pragma unroll
    for (int i = 0; i < kN; ++i) {  // one exponential a class: of the old maximum or of the new value
      const float gap = v[i] - z - max[i];
      const float e = exp_nonpos(-fabsf(gap));
      sum[i] = gap > 0.0f ? sum[i] * e + 1.0f : sum[i] + e;
      max[i] = gap > 0.0f ? v[i] - z : max[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kN; ++i) out[i] = max[i] + logf(sum[i]);
}

}  // namespace di4c::cuda
