// What the kernels use of CUDA, for a C++ compiler: found in place of the toolkit's header of this name.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstring>
#include <tuple>

#include "simt.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one CTA runs at a time; what it leaves there the next one finds, as on a GPU
#define __CUDA_ARCH_LIST__ 800, 900

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// ---- barriers and warp operations; the defaults name the caller ----

#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_SITE) { simt::meet_cta(false, {file, line}); }
inline int __syncthreads_or(int flag, SIMT_SITE) { return simt::meet_cta(flag != 0, {file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) { simt::meet_warp(0, mask, {file, line}); }

inline unsigned __ballot_sync(unsigned mask, int flag, SIMT_SITE) {
  const uint64_t* flags = simt::meet_warp(flag != 0, mask, {file, line});
  unsigned ballot = 0;
  for (unsigned i = 0; i < simt::kWarp; ++i) ballot |= static_cast<unsigned>(flags[i]) << i;
  return ballot;
}
inline int __any_sync(unsigned mask, int flag, SIMT_SITE) { return __ballot_sync(mask, flag, file, line) != 0; }

namespace simt {

template <class T>
T take_from(unsigned source, T value, unsigned mask, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = meet_warp(bits, mask, site)[source % kWarp];
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int source, SIMT_SITE) {
  return simt::take_from(static_cast<unsigned>(source), value, mask, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, SIMT_SITE) {
  return simt::take_from(simt::lane() ^ static_cast<unsigned>(flip), value, mask, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, SIMT_SITE) {
  const unsigned lane = simt::lane();
  return simt::take_from(lane < distance ? lane : lane - distance, value, mask, {file, line});
}

// ---- arithmetic ----

inline int __ffs(int v) { return __builtin_ffs(v); }
inline float __fmul_rn(float a, float b) { return a * b; }  // compiled without contraction

// ---- the runtime ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
};
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace simt {
inline int device = 0;                           // of two
inline cudaError_t next_launch = cudaSuccess;    // what the next launch returns in place of running
inline int launches_off_device = 0, wanted_device = 0;
}  // namespace simt

inline cudaError_t cudaGetDevice(int* device) { return *device = simt::device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  simt::device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    default: return "unknown error";
  }
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return *value = attribute == cudaDevAttrComputeCapabilityMajor ? 7 : 5, cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 ||
      grid.z == 0 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (simt::next_launch != cudaSuccess) return simt::next_launch;
  if (simt::device != simt::wanted_device) ++simt::launches_off_device;
  const std::tuple<Parameters...> copies(arguments...);
  simt::run_grid(grid, block, [&] { std::apply(kernel, copies); });
  return cudaSuccess;
}
