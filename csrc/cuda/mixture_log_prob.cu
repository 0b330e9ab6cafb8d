#include "mixture_log_prob.cuh"

#include "launch.cuh"

namespace di4c::cuda {

void mixture_log_prob(const MixtureLogProbArgs& p, int device, void* stream) {
  const DeviceGuard guard(device);
  if (p.B == 0 || p.L == 0) return;
  launch_lse({"mixture_log_prob (row lse)", p.B, p.L, p.D, p.S}, p.logits, p.weight, p.lse, stream);
  if (p.K == 0) return;
  const dim3 block(kWarp, 8);
  const int64_t blocks = ceil_div(p.D, kPositions);
  if (blocks > 0) {
    launch({"mixture_log_prob (positions)", p.B, p.L, p.D, p.S}, mixture_positions_kernel, grid_over(blocks, p.B),
           block, stream, p);
  }
  launch({"mixture_log_prob (finish)", p.B, p.L, p.D, p.S}, mixture_finish_kernel, grid_for(p.B * p.K, block.y), block,
         stream, p);
}

void mixture_log_prob_backward(const MixtureLogProbBackwardArgs& p, int device, void* stream) {
  const DeviceGuard guard(device);
  if (p.B * p.D == 0 || p.L == 0 || p.S == 0) return;
  const dim3 block = row_block(p.S), grid = grid_over(p.D, p.B);
  with_dtype(p.logits.dtype, [&](auto dtype) {
    int64_t k0 = 0;
    do {  // at least once: with no sequences the gradient is still to be set to 0
      const int count = static_cast<int>(std::min<int64_t>(p.K - k0, kTokens));
      launch({"mixture_log_prob_backward", p.B, p.L, p.D, p.S},
             mixture_log_prob_backward_kernel<decltype(dtype)::value>, grid, block, stream, p, k0, count);
      k0 += kTokens;
    } while (k0 < p.K);
  });
}

}  // namespace di4c::cuda
