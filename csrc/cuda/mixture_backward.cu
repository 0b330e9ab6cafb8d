#include "mixture_backward.cuh"

#include "launch.cuh"

namespace di4c::cuda {

namespace {

// From DRAM: every row of the logits once, the gradient once. (From the caches besides: the rows once more where there
// are a teacher or a target, and two sectors of 32 bytes for each of the B L D K tokens' logits.)
int64_t backward_bytes(const MixtureBackwardArgs& p) {
  const auto rows = [&](const Logits& x, int64_t count) {
    return x.data == nullptr ? 0 : p.B * count * p.D * (row_bytes(x.dtype, p.S) + 8);
  };
  const int64_t pulls = ((p.teacher.data != nullptr) + (p.T > 0)) * p.B * p.L * p.D * 4;
  return rows(p.logits, p.L) + rows(p.teacher, 1) + rows(p.target, p.T) + pulls + p.B * p.K * (p.D * 8 + p.L * 4) +
         p.B * p.L * p.D * row_bytes(p.logits.dtype, p.S);
}

}  // namespace

void mixture_backward(const MixtureBackwardArgs& p, int device, void* stream) {
  const DeviceGuard guard(device);
  if (p.B * p.L * p.D == 0 || (p.S == 0 && p.logits.dtype != kLogistic)) return;
  check_components("mixture_backward", p.L);
  const dim3 block = mixture_block(p.S, p.L);
  Shape shape{grid_over(ceil_div(p.D, block.y), p.B), block};
  // The tiles of a long row do not wait for one another, and have a CTA each. But where the gradient takes the place of
  // the logits, none may write before all have read what they need: then a cluster shares the row.
  const int64_t tiles = ceil_div(p.S, int64_t{block.x} * kVector);
  if (block.y == 1 && p.logits.dtype != kLogistic) {
    if (p.grad != p.logits.data) {
      shape.grid.z = static_cast<unsigned>(std::min<int64_t>({tiles, DI4C_MAX_GRID, 65535}));
    } else if (current_device().major >= 9) {
      while (shape.cluster < kMaxParts && 2 * shape.cluster <= tiles) shape.cluster *= 2;
      shape.grid.x *= shape.cluster;
    }
  }
  const Work work{"mixture_backward", p.B, p.L, p.D, p.S, backward_bytes(p)};
  with_logits(p.logits.dtype, [&](auto dtype) {
    launch(work, mixture_backward_kernel<decltype(dtype)::value>, shape, stream, p, static_cast<int>(shape.cluster));
  });
}

}  // namespace di4c::cuda
