#include "common.cuh"

#include "launch.cuh"

#define DI4C_TEXT_OF(...) #__VA_ARGS__
#define DI4C_TEXT(...) DI4C_TEXT_OF(__VA_ARGS__)

namespace di4c::cuda {

DeviceGuard::DeviceGuard(int device) {
  int current = -1;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess && current != device) {
    error = cudaSetDevice(device);
    if (error == cudaSuccess) previous_ = current;
  }
  if (error != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error("di4c: cannot use cuda:" + std::to_string(device) + ": " + cudaGetErrorString(error));
  }
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

void throw_launch_error(const Work& work, cudaError_t error) {
  std::string text = std::string("di4c: kernel ") + work.kernel + " on (B, L, D, S) = (" + std::to_string(work.B) +
                     ", " + std::to_string(work.L) + ", " + std::to_string(work.D) + ", " + std::to_string(work.S) +
                     "): " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    text += ". cuda:" + std::to_string(device) + " is sm_" + std::to_string(major * 10 + minor) +
            "; these kernels were built for " DI4C_TEXT(__CUDA_ARCH_LIST__) ". Rebuild with DI4C_CUDA_ARCHS=" +
            std::to_string(major * 10 + minor);
  }
  throw std::runtime_error(text);
}

void launch_lse(const Work& work, const Logits& x, const float* weight, float* lse, void* stream) {
  const int64_t rows = work.B * work.L * work.D;
  if (rows == 0) return;
  const dim3 block = row_block(work.S), grid = grid_for(rows, block.y);
  with_dtype(x.dtype, [&](auto dtype) {
    launch(work, lse_kernel<decltype(dtype)::value>, grid, block, stream, x, weight, lse, work.B, work.L, work.D,
           work.S);
  });
}

void launch_weighted_sum(const Work& work, const float* row, const float* weight, float* out, void* stream) {
  const int64_t N = work.B * work.L;
  if (N == 0) return;
  const dim3 block(kWarp, 4);
  launch(work, weighted_sum_kernel, grid_for(N, block.y), block, stream, row, weight, out, N, work.L, work.D);
}

}  // namespace di4c::cuda
