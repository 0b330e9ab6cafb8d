// Log-sum-exp in one pass: a running maximum and the sum of exponentials below it.
#pragma once
#include <cfloat>

#include "di4c/exp.h"
#include "group.cuh"
#include "row.cuh"

namespace di4c::cuda {

// e^x for x <= 0 by the processor's own instruction: relative error 2^-22 and what half an ulp of x log2 e makes, so at
// most 4e-7 absolute; below 2^-126 it is 0. (exp.h's takes three times the instructions, which a row of bfloat16 has no
// time for. It stays where backends must agree to the bit: where tokens are drawn.)
__device__ __forceinline__ float exp_quick(float x) {
#if defined(__CUDA_ARCH__)
  float v;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(x * kLog2e));
  return v;
#else
  return exp_nonpos(x);
#endif
}

struct Online {
  float max = -FLT_MAX;  // not -inf: then -inf less the maximum is -inf, never NaN
  float sum = 0.0f;      // NaN as soon as a NaN or a +inf was seen

  template <int kN>
  __device__ __forceinline__ void add(const float (&x)[kN]) {
    float top = x[0];
#pragma unroll
    for (int i = 1; i < kN; ++i) top = fmaxf(top, x[i]);
    if (top > max) {
      sum *= exp_quick(max - top);
      max = top;
    }
    float part = 0.0f;
#pragma unroll
    for (int i = 0; i < kN; ++i) part += exp_quick(x[i] - max);
    sum += part;
  }

  __device__ __forceinline__ void add(float x) {
    const float one[1] = {x};
    add(one);
  }

  __device__ __forceinline__ Online merged(const Group& group) const {
    Online all;
    all.max = group.max(max);
    all.sum = group.sum(sum * exp_quick(max - all.max));
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

// A row that is no distribution (NaN, +inf, all -inf) gives NaN, which every value computed from it inherits.
__device__ __forceinline__ Norm norm_of(const Online& all) { return {all.max, all.sum > 0.0f ? logf(all.sum) : NAN}; }

}  // namespace di4c::cuda
