#include "launch.cuh"

#include <map>
#include <mutex>

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

namespace {

std::mutex once;

int current_index() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}

}  // namespace

Device current_device() {
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(once);
  const int index = current_index();
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  Device device = {};
  cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index);
  cudaDeviceGetAttribute(&device.shared_of_cta, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  cudaDeviceGetAttribute(&device.shared_of_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  return known[index] = device;
}

void allow_shared(const void* kernel, size_t bytes) {
  static std::map<std::pair<const void*, int>, size_t> allowed;
  const std::lock_guard<std::mutex> lock(once);
  size_t& most = allowed[{kernel, current_index()}];
  if (bytes <= most) return;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)) == cudaSuccess)
    most = bytes;  // else the launch fails, and says with what shape
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

}  // namespace di4c::cuda
