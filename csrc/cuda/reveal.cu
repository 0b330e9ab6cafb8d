#include "reveal.cuh"

#include "launch.cuh"

namespace di4c::cuda {

void reveal(const RevealArgs& a, int device, void* stream) {
  const DeviceGuard guard(device);
  const int64_t sequences = a.B * a.draws;
  if (sequences == 0 || a.D == 0) return;
  const dim3 block(static_cast<unsigned>(std::min<int64_t>(ceil_div(a.D, kWarp) * kWarp, kMaxThreads)));
  const Work work{"reveal", a.B, a.draws, a.D, 1, a.B * a.D * 8 + sequences * a.D * (8 + 4 + 8)};
  launch(work, reveal_kernel, grid_for(sequences, 1), block, stream, a);
}

}  // namespace di4c::cuda
