// What the kernels use of CUDA, for a C++ compiler: found in place of the toolkit's header of this name.
#pragma once
#include <dlfcn.h>

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <map>
#include <tuple>

#include "simt.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
// What a CTA leaves in a static variable the next one finds, as on a GPU; and so they run one at a time.
#define __shared__ const bool SIMT_NAME(simt_alone) [[maybe_unused]] = simt::run_alone(); static
#define SIMT_NAME(prefix) SIMT_PASTE(prefix, __LINE__)
#define SIMT_PASTE(a, b) SIMT_PASTE_AGAIN(a, b)
#define SIMT_PASTE_AGAIN(a, b) a##b
#define SIMT_SHARED(type, name) type& name = *static_cast<type*>(simt::shared({__FILE__, __LINE__}, sizeof(type)))
#define SIMT_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(simt::dynamic_shared())
#define SIMT_NOTE(kernel, bytes) simt::noted = kernel, simt::noted_bytes = bytes
#define __CUDA_ARCH_LIST__ 800, 900

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// ---- barriers and warp operations; the defaults name the caller ----

#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_SITE) { simt::meet_cta(false, {file, line}); }
inline int __syncthreads_or(int flag, SIMT_SITE) { return simt::meet_cta(flag != 0, {file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) { simt::meet_warp(0, mask, {file, line}); }

inline void __threadfence() { simt::pause(); }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  simt::pause();
  const unsigned before = *address;
  *address += value;
  simt::pause();
  return before;
}

inline void __cluster_barrier_arrive(SIMT_SITE) { simt::meet_cluster({file, line}); }
inline void __cluster_barrier_wait() {}  // arriving has waited
inline unsigned __clusterRelativeBlockRank() { return simt::rank_in_cluster(); }
inline void* __cluster_map_shared_rank(const void* p, unsigned rank) { return simt::in_peer(p, rank); }

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
template <class T>
T __ldcg(const T* p) {
  return *p;
}
inline float __fmul_rn(float a, float b) { return a * b; }  // compiled without contraction

// ---- the runtime ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
};
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace simt {
inline int device = 0;                           // of two
inline int capability = 75;                      // of both, as major * 10 + minor
inline cudaError_t next_launch = cudaSuccess;    // what the next launch returns in place of running
inline int launches_off_device = 0, wanted_device = 0;
inline const char* noted = "";                   // what launch() says of the launch that follows
inline int64_t noted_bytes = 0;
inline FILE* plan = nullptr;                     // launches are listed here in place of running
inline std::map<const void*, size_t> allowed_dynamic;  // shared memory of kernels that asked for more than 48 KiB
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
  const int major = simt::capability / 10, large = major == 9 || major == 10 ? 228 : simt::capability == 80 ? 164 : 100;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: return *value = major, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: return *value = simt::capability % 10, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return *value = large << 10, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return *value = (large - 1) << 10, cudaSuccess;
  }
  return cudaErrorInvalidConfiguration;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  int most = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, simt::device);
  if (value > most) return cudaErrorInvalidConfiguration;
  simt::allowed_dynamic[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const auto allowed = simt::allowed_dynamic.find(reinterpret_cast<const void*>(kernel));
  const size_t most_dynamic = allowed == simt::allowed_dynamic.end() ? 48 << 10 : allowed->second;
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) cluster = config->attrs[i].val.clusterDim.x;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 ||
      grid.z == 0 || grid.z > 65535 || cluster == 0 || cluster > 8 || grid.x % cluster != 0 ||
      (cluster > 1 && simt::capability < 90) || config->dynamicSmemBytes > most_dynamic)
    return cudaErrorInvalidConfiguration;
  if (simt::next_launch != cudaSuccess) return simt::next_launch;
  if (simt::device != simt::wanted_device) ++simt::launches_off_device;
  if (simt::plan) {
    Dl_info symbol = {};
    dladdr(reinterpret_cast<void*>(kernel), &symbol);
    fprintf(simt::plan, "%s\t%s\t%u %u %u\t%u %u %u\t%u\t%zu\t%lld\n", simt::noted,
            symbol.dli_sname ? symbol.dli_sname : "?", grid.x, grid.y, grid.z, block.x, block.y, block.z, cluster,
            config->dynamicSmemBytes, static_cast<long long>(simt::noted_bytes));
    return cudaSuccess;
  }
  const std::tuple<Parameters...> copies(arguments...);
  simt::run_grid(grid, block, cluster, config->dynamicSmemBytes, [&] { std::apply(kernel, copies); });
  return cudaSuccess;
}
