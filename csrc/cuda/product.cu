#include "product.cuh"

#include "launch.cuh"

namespace di4c::cuda {

void sample_product(const ProductArgs& a, int device, void* stream) {
  const DeviceGuard guard(device);
  const int64_t rows = a.B * a.draws * a.D;
  if (rows == 0 || a.S == 0) return;
  const dim3 warp_each(kWarp, kMaxThreads / kWarp);
  const int64_t tables = a.base == nullptr ? 2 : 3;
  const Work work{"sample_product", a.B, a.draws, a.D, a.S, tables * a.N * a.S * a.S * 8 + a.B * a.D * 8 + rows * 16};
  launch(work, sample_product_kernel, grid_for(rows, warp_each.y), warp_each, stream, a);
}

}  // namespace di4c::cuda
