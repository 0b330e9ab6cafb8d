#include "mixture_kl.cuh"

#include "launch.cuh"

namespace di4c::cuda {

namespace {

dim3 tile_block(int64_t S) {  // a thread per vector, whole warps
  const int64_t vectors = ceil_div(std::min<int64_t>(S, kTile), kVector);
  return dim3(static_cast<unsigned>(ceil_div(std::max<int64_t>(vectors, 1), kWarp) * kWarp));
}

}  // namespace

void mixture_kl(const MixtureKlArgs& p, int device, void* stream) {
  const DeviceGuard guard(device);
  if (p.B == 0 || p.L == 0 || p.T == 0) return;
  launch_lse({"mixture_kl (target lse)", p.B, p.T, p.D, p.S}, p.target, p.weight, p.lse_target, stream);
  launch_lse({"mixture_kl (row lse)", p.B, p.L, p.D, p.S}, p.logits, p.weight, p.lse, stream);
  const Work work{"mixture_kl", p.B, p.L, p.D, p.S};
  if (p.D > 0) {
    with_dtype(p.logits.dtype, [&](auto dtype) {
      launch(work, mixture_kl_kernel<decltype(dtype)::value>, grid_over(p.D, p.B), tile_block(p.S), stream, p);
    });
  }
  launch_weighted_sum({"mixture_kl (sum over positions)", p.B, 1, p.D, p.S}, p.row, p.weight, p.kl, stream);
}

void mixture_kl_backward(const MixtureKlBackwardArgs& p, int device, void* stream) {
  const DeviceGuard guard(device);
  if (p.B * p.L * p.D * p.S == 0) return;
  dim3 grid = grid_over(p.D, p.B);
  grid.z = static_cast<unsigned>(std::min<int64_t>({ceil_div(p.S, kTile), DI4C_MAX_GRID, 65535}));
  with_dtype(p.logits.dtype, [&](auto dtype) {
    launch({"mixture_kl_backward", p.B, p.L, p.D, p.S}, mixture_kl_backward_kernel<decltype(dtype)::value>, grid,
           tile_block(p.S), stream, p);
  });
}

}  // namespace di4c::cuda
