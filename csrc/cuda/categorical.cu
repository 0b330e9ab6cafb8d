#include "categorical.cuh"

#include "launch.cuh"

namespace di4c::cuda {

void random_bits(const RandomBitsArgs& a, int device, void* stream) {
  const DeviceGuard guard(device);
  const int64_t items = a.B * a.N;
  if (items == 0) return;
  const dim3 block(256);
  launch({"random_bits", a.B, 1, a.N, 1}, random_bits_kernel, grid_for(items, block.x), block, stream, a);
}

void sample(const SampleArgs& a, int device, void* stream) {
  const DeviceGuard guard(device);
  const int64_t rows = a.B * a.D;
  if (rows == 0 || a.draws == 0 || a.S == 0) return;
  if (a.S > kMaxStates) {
    throw std::runtime_error("di4c: sample takes at most " + std::to_string(kMaxStates) + " states, got S = " +
                             std::to_string(a.S));
  }
  const Work work{"sample", a.B, 1, a.D, a.S};
  with_dtype(a.logits.dtype, [&](auto dtype) {
    if (a.S <= kChunk) {
      const dim3 block(kWarp, kMaxThreads / kWarp);
      launch(work, sample_short_kernel<decltype(dtype)::value>, grid_for(rows, block.y), block, stream, a);
    } else {
      const int64_t warps = std::min<int64_t>(ceil_div(a.S, kChunk), kMaxWarps);
      const dim3 block(static_cast<unsigned>(warps * kWarp));
      launch(work, sample_long_kernel<decltype(dtype)::value>, grid_over(a.D, a.B), block, stream, a);
    }
  });
}

}  // namespace di4c::cuda
