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

void launch(void (*kernel)(int*), int* values) {
  cudaLaunchConfig_t config;
  config.blockDim = dim3(64);
  cudaLaunchKernelEx(&config, kernel, values);
}

}  // namespace

bool run_broken(const std::string& name, int* values) {
  if (name == "divergent_barrier") return launch(divergent_barrier, values), true;
  if (name == "barriers_at_two_places") return launch(barriers_at_two_places, values), true;
  if (name == "divergent_shuffle") return launch(divergent_shuffle, values), true;
  if (name == "write_beyond_the_end") return launch(write_beyond_the_end, values), true;
  if (name == "read_before_the_start") return launch(read_before_the_start, values), true;
  if (name == "write_beyond_shared") return launch(write_beyond_shared, values), true;
  if (name == "misaligned_vector") return launch(misaligned_vector, values), true;
  if (name == "missing_barrier") return launch(missing_barrier, values), true;
  return false;
}
