// Launching: device guard, grid and block from the shape alone, errors that name kernel and shape.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "di4c/api.h"
#include "team.cuh"

namespace di4c::cuda {

// Rows beyond this many CTAs are taken in further turns of each kernel's own loop. (The tests make it small.)
#ifndef DI4C_MAX_GRID
#define DI4C_MAX_GRID (int64_t{1} << 30)
#endif

// So many CTAs fill any device.
#ifndef DI4C_MANY_CTAS
#define DI4C_MANY_CTAS 2048
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

// What an error message and a launch plan say about a launch. `bytes` is what it moves to and from memory: the rows it
// reads and writes, again where it reads them again and shared memory has not kept them, and what else it keeps. All
// weights are taken as used.
struct Work {
  const char* kernel;
  int64_t B, L, D, S;
  int64_t bytes = 0;
};

// What a launcher looks at of the current device; asked for once.
struct Device {
  int major;                      // of the compute capability: from 9 on CTAs form clusters
  int shared_of_cta, shared_of_sm;  // bytes of shared memory that one may use, that all on a multiprocessor share
};
Device current_device();

// Lets a kernel have so many bytes of dynamic shared memory; asked for once per kernel and device.
void allow_shared(const void* kernel, size_t bytes);

struct Shape {
  dim3 grid, block;
  unsigned cluster = 1;  // CTAs, along x
  size_t shared = 0;     // bytes of dynamic shared memory
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

// How a row of S classes is shared: by several CTAs where rows are long and few, which changes no bit of a result.
// `workspace` as in api.h, or null: without it, a device without clusters has a CTA to a row.
inline Split split_rows(int64_t S, int64_t rows, uint32_t* workspace) {
  Split split{kTurns, row_parts(S), nullptr, nullptr};
  if (split.parts == 1 || rows > kFewRows) return split;
  if (current_device().major >= 9) {
    split.way = kCluster;
  } else if (workspace != nullptr) {
    split = {kTicket, split.parts, workspace, reinterpret_cast<float*>(workspace + rows)};
  }
  return split;
}

// So many teams, each of the CTAs that share a row.
inline Shape split_shape(const Split& split, int64_t teams, dim3 block, size_t shared = 0) {
  Shape shape{grid_for(teams, 1), block, 1, shared};
  shape.grid.x *= split.team();
  if (split.way == kCluster) shape.cluster = split.team();
  return shape;
}

// The one door to the device.
template <class... Parameters, class... Arguments>
void launch(const Work& work, void (*kernel)(Parameters...), const Shape& shape, void* stream,
            const Arguments&... arguments) {
#ifdef SIMT_NOTE
  SIMT_NOTE(work.kernel, work.bytes);
#endif
  constexpr size_t kAlways = 48 << 10;  // bytes of shared memory that need no asking
  if (shape.shared > kAlways) allow_shared(reinterpret_cast<const void*>(kernel), shape.shared);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = shape.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  const cudaError_t pending = cudaGetLastError();
  if (error != cudaSuccess || pending != cudaSuccess) throw_launch_error(work, error != cudaSuccess ? error : pending);
}

template <class... Parameters, class... Arguments>
void launch(const Work& work, void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream,
            const Arguments&... arguments) {
  launch(work, kernel, Shape{grid, block}, stream, arguments...);
}

// A value as a type, to choose a template by.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Logits that lie in memory.
template <class F>
void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case kFloat32: return f(Constant<kFloat32>());
    case kBFloat16: return f(Constant<kBFloat16>());
    case kFloat16: return f(Constant<kFloat16>());
    case kLogistic: break;
  }
  throw std::runtime_error("di4c: unknown dtype code " + std::to_string(static_cast<int>(dtype)));
}

// Logits however they come.
template <class F>
void with_logits(DType dtype, F f) {
  if (dtype == kLogistic) return f(Constant<kLogistic>());
  with_dtype(dtype, f);
}

// Bytes of one row.
inline int64_t row_bytes(DType dtype, int64_t S) {
  return dtype == kLogistic ? 8 : S * (dtype == kFloat32 ? 4 : 2);
}

}  // namespace di4c::cuda
