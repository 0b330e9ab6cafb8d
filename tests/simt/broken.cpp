#include "broken.h"

#include <cuda_runtime.h>

namespace {

__global__ void divergent_barrier(int* values) {
  if (threadIdx.x < 48) __syncthreads();
  values[threadIdx.x] = 1;
}

__global__ void barriers_at_two_places(int* values) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  values[threadIdx.x] = 1;
}

__global__ void divergent_shuffle(int* values) {
  if (threadIdx.x % 2 == 0) values[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 2);
}

__global__ void write_beyond_the_end(int* values) { values[threadIdx.x + 1] = 1; }

__global__ void read_before_the_start(int* values) { values[threadIdx.x] = values[static_cast<int>(threadIdx.x) - 2]; }

__global__ void write_beyond_shared(int* values) {
  __shared__ int shared[64];
  int* next = shared + threadIdx.x;
  next[1] = 1;
  __syncthreads();
  values[threadIdx.x] = shared[threadIdx.x];
}

__global__ void misaligned_vector(int* values) {
  const uint4 word = reinterpret_cast<const uint4*>(values + 1)[0];
  values[threadIdx.x] = static_cast<int>(word.x);
}

__global__ void missing_barrier(int* values) {  // right only where the threads run by index
  __shared__ int shared[64];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  values[threadIdx.x] = threadIdx.x > 0 ? shared[threadIdx.x - 1] : -1;
  __syncthreads();
  shared[threadIdx.x] = -2;
}

// ---- clusters of two CTAs of 32 threads; each takes 32 of the values ----

using Shared = int[32];

void cluster_sync() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}

int* in_peer(int* p) { return static_cast<int*>(__cluster_map_shared_rank(p, 1 - __clusterRelativeBlockRank())); }

// What the peer put here: right where all three barriers are.
void swap_with_peer(int* values, bool at_start, bool between, bool at_end) {
  SIMT_SHARED(Shared, shared);
  if (at_start) cluster_sync();
  in_peer(shared)[threadIdx.x] = static_cast<int>(blockIdx.x);
  if (between) cluster_sync();
  values[blockIdx.x * 32 + threadIdx.x] = shared[threadIdx.x];
  if (at_end) {
    cluster_sync();
    values[blockIdx.x * 32 + threadIdx.x] += in_peer(shared)[threadIdx.x];
    cluster_sync();
  }
}

__global__ void right_cluster(int* values) { swap_with_peer(values, true, true, true); }
__global__ void peer_not_started(int* values) { swap_with_peer(values, false, true, true); }
__global__ void missing_cluster_barrier(int* values) { swap_with_peer(values, true, false, true); }

__global__ void peer_has_left(int* values) {
  swap_with_peer(values, true, true, false);
  SIMT_SHARED(Shared, shared);
  cluster_sync();
  if (blockIdx.x == 1) values[32 + threadIdx.x] = in_peer(shared)[threadIdx.x];
}

__global__ void divergent_cluster_barrier(int* values) {
  if (blockIdx.x == 0) cluster_sync();
  values[blockIdx.x * 32 + threadIdx.x] = 1;
}

__global__ void write_beyond_cta_memory(int* values) {
  SIMT_SHARED(Shared, shared);
  int* next = shared + threadIdx.x;
  next[1] = 1;
  __syncthreads();
  values[blockIdx.x * 32 + threadIdx.x] = shared[threadIdx.x];
}

__global__ void write_beyond_a_peers_memory(int* values) {
  SIMT_SHARED(Shared, shared);
  cluster_sync();
  in_peer(shared)[threadIdx.x + 1] = 1;
  cluster_sync();
  values[blockIdx.x * 32 + threadIdx.x] = shared[threadIdx.x];
}

__global__ void static_memory_in_a_cluster(int* values) {
  __shared__ int shared[32];
  shared[threadIdx.x] = 1;
  values[blockIdx.x * 32 + threadIdx.x] = shared[threadIdx.x];
}

// ---- tickets: four CTAs of 64 threads leave a sum each, the last to come adds them up ----

unsigned ticket = 0;
int partials[4 * 64];

void sum_by_ticket(int* values, bool barrier, bool reset) {
  partials[blockIdx.x * 64 + threadIdx.x] = static_cast<int>(blockIdx.x + 1);
  if (barrier) __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&ticket, 1) % (reset ? 4 : 8) == 3;
    if (last && reset) ticket = 0;
    __threadfence();
  }
  if (!__syncthreads_or(last)) return;
  values[threadIdx.x] = 0;
  for (int i = 0; i < 4; ++i) {
    values[threadIdx.x] += partials[i * 64 + threadIdx.x];
    partials[i * 64 + threadIdx.x] = 0;
  }
}

__global__ void right_ticket(int* values) { sum_by_ticket(values, true, true); }
__global__ void ticket_before_its_sum(int* values) { sum_by_ticket(values, false, true); }
__global__ void ticket_not_reset(int* values) { sum_by_ticket(values, true, false); }

__global__ void more_shared_memory_than_asked_for(int* values) {
  SIMT_DYNAMIC_SHARED(int, shared);
  shared[threadIdx.x] = 1;
  values[threadIdx.x] = shared[threadIdx.x];
}

struct Kernel {
  const char* name;
  void (*kernel)(int*);
  unsigned ctas = 1, threads = 64, cluster = 1;
  size_t shared = 0;
};

const Kernel kKernels[] = {
    {"divergent_barrier", divergent_barrier},
    {"barriers_at_two_places", barriers_at_two_places},
    {"divergent_shuffle", divergent_shuffle},
    {"write_beyond_the_end", write_beyond_the_end},
    {"read_before_the_start", read_before_the_start},
    {"write_beyond_shared", write_beyond_shared},
    {"misaligned_vector", misaligned_vector},
    {"missing_barrier", missing_barrier},
    {"right_cluster", right_cluster, 2, 32, 2},
    {"peer_not_started", peer_not_started, 2, 32, 2},
    {"missing_cluster_barrier", missing_cluster_barrier, 2, 32, 2},
    {"peer_has_left", peer_has_left, 2, 32, 2},
    {"divergent_cluster_barrier", divergent_cluster_barrier, 2, 32, 2},
    {"write_beyond_cta_memory", write_beyond_cta_memory, 2, 32},
    {"write_beyond_a_peers_memory", write_beyond_a_peers_memory, 2, 32, 2},
    {"static_memory_in_a_cluster", static_memory_in_a_cluster, 2, 32, 2},
    {"cluster_that_does_not_fit", right_cluster, 2, 32, 16},
    {"right_ticket", right_ticket, 4},
    {"ticket_before_its_sum", ticket_before_its_sum, 4},
    {"ticket_not_reset", ticket_not_reset, 4},
    {"write_beyond_dynamic_memory", more_shared_memory_than_asked_for, 1, 64, 1, 4 * 63},
    {"too_much_dynamic_memory", more_shared_memory_than_asked_for, 1, 64, 1, 49 << 10},
};

}  // namespace

bool run_broken(const std::string& name, int* values) {
  for (const Kernel& k : kKernels) {
    if (name != k.name) continue;
    cudaLaunchAttribute cluster = {cudaLaunchAttributeClusterDimension, {{k.cluster, 1, 1}}};
    cudaLaunchConfig_t config;
    config.gridDim = dim3(k.ctas);
    config.blockDim = dim3(k.threads);
    config.dynamicSmemBytes = k.shared;
    config.attrs = &cluster;
    config.numAttrs = 1;
    const cudaError_t error = cudaLaunchKernelEx(&config, k.kernel, values);
    if (error != cudaSuccess) simt::fail("%s", cudaGetErrorString(error));
    return true;
  }
  return false;
}
