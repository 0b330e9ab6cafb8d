// Launching: device guard, grid and block from the shape alone, errors that name kernel and shape.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "di4c/api.h"
#include "group.cuh"

namespace di4c::cuda {

// Rows beyond this many CTAs are taken in further turns of each kernel's own loop. (The tests make it small.)
#ifndef DI4C_MAX_GRID
#define DI4C_MAX_GRID (int64_t{1} << 30)
#endif

// Makes `device` current, and what was current before so again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

// What an error message says about a launch.
struct Work {
  const char* kernel;
  int64_t B, L, D, S;
};

[[noreturn]] void throw_launch_error(const Work& work, cudaError_t error);

// Threads to a row, rows to a CTA: from S alone, so that no result depends on the batch or the device.
inline dim3 row_block(int64_t S) {
  if (S <= 1024) return dim3(kWarp, 8);
  if (S <= 8192) return dim3(128, 1);
  return dim3(kMaxThreads, 1);
}

// A CTA per (b, d); see for_positions.
inline dim3 grid_over(int64_t D, int64_t B) {
  return dim3(static_cast<unsigned>(std::min<int64_t>(D, DI4C_MAX_GRID)),
              static_cast<unsigned>(std::min<int64_t>({B, DI4C_MAX_GRID, 65535})));
}

inline dim3 grid_for(int64_t items, int64_t items_per_cta) {
  return dim3(static_cast<unsigned>(std::min<int64_t>(ceil_div(items, items_per_cta), DI4C_MAX_GRID)));
}

template <class... Parameters, class... Arguments>
void launch(const Work& work, void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  const cudaError_t pending = cudaGetLastError();
  if (error != cudaSuccess || pending != cudaSuccess) throw_launch_error(work, error != cudaSuccess ? error : pending);
}

// A value as a type, to choose a template by.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <class F>
void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case kFloat32: return f(Constant<kFloat32>());
    case kBFloat16: return f(Constant<kBFloat16>());
    case kFloat16: return f(Constant<kFloat16>());
  }
  throw std::runtime_error("di4c: unknown dtype code " + std::to_string(static_cast<int>(dtype)));
}

// Shared by the families (common.cu): lse (2, B, L, D) of every row whose weight is not 0, else 0.
void launch_lse(const Work& work, const Logits& x, const float* weight, float* lse, void* stream);

// Shared by the families (common.cu): out[n] = sum_d weight[n / L, d] row[n, d] over n < B L.
void launch_weighted_sum(const Work& work, const float* row, const float* weight, float* out, void* stream);

}  // namespace di4c::cuda
