// The threads that share one row, and the sums and maxima they take together.
//
// A CTA is blockDim.y groups of blockDim.x threads. Short rows get one warp each (blockDim.x = 32, several
// groups to a CTA); long rows get the whole CTA (blockDim.y = 1). Every reduction is a butterfly over lanes,
// then over warps: one fixed order, the same bits in every thread.
#pragma once
#include <cuda_runtime.h>

#include "di4c/config.h"

namespace di4c::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;
constexpr int kMinCtas = 2;  // on a multiprocessor; told that this will do, ptxas spills nothing to fit more

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(kFullWarp, v, step));
  return v;
}

template <class T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) v += __shfl_xor_sync(kFullWarp, v, step);
  return v;
}

// Inclusive prefix sum over the lanes; for integers, where every order of addition is exact.
__device__ __forceinline__ uint64_t warp_prefix(uint64_t v, int lane) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const uint64_t below = __shfl_up_sync(kFullWarp, v, step);
    if (lane >= step) v += below;
  }
  return v;
}

// Shared memory of a CTA. The host's emulator gives every CTA its own, that several may run interleaved.
#if defined(SIMT_SHARED)
#define DI4C_SHARED(type, name) SIMT_SHARED(type, name)
#define DI4C_DYNAMIC_SHARED(type, name) SIMT_DYNAMIC_SHARED(type, name)
#else
#define DI4C_SHARED(type, name) __shared__ type name
#define DI4C_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

using Scratch = float[kWarp];

// One group. `scratch` is kWarp floats of shared memory, used only where the group is the whole CTA.
// All threads of a group must call its functions together.
struct Group {
  int rank, size;
  float* scratch;

  __device__ __forceinline__ explicit Group(float* shared)
      : rank(threadIdx.x), size(blockDim.x), scratch(shared) {}

  __device__ __forceinline__ void sync() const {
    if (size == kWarp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  __device__ __forceinline__ float max(float v) const {
    v = warp_max(v);
    return size == kWarp ? v : warp_max(gather(v, -INFINITY));
  }

  __device__ __forceinline__ float sum(float v) const {
    v = warp_sum(v);
    return size == kWarp ? v : warp_sum(gather(v, 0.0f));
  }

  __device__ __forceinline__ bool any(bool v) const {
    return size == kWarp ? __any_sync(kFullWarp, v) : __syncthreads_or(v);
  }

 private:
  // Lane i of every warp receives warp i's value; lanes beyond the last warp receive `none`.
  __device__ __forceinline__ float gather(float v, float none) const {
    const int lane = rank % kWarp;
    if (lane == 0) scratch[rank / kWarp] = v;
    __syncthreads();
    v = lane < size / kWarp ? scratch[lane] : none;
    __syncthreads();  // scratch may be written again
    return v;
  }
};

// Which row of `rows` this group takes first, and how far its next one lies.
__device__ __forceinline__ int64_t first_row() { return int64_t{blockIdx.x} * blockDim.y + threadIdx.y; }
__device__ __forceinline__ int64_t row_step() { return int64_t{gridDim.x} * blockDim.y; }

// Calls f(b, d) for the positions that fall to this CTA of a grid over (D, B). No division: the 64-bit one is a
// function call that costs registers.
template <class F>
__device__ __forceinline__ void for_positions(int64_t B, int64_t D, F f) {
  for (int64_t b = blockIdx.y; b < B; b += gridDim.y)
    for (int64_t d = blockIdx.x; d < D; d += gridDim.x) f(b, d);
}

}  // namespace di4c::cuda
