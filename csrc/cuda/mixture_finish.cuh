// Before the positions and after them: tickets set to 0, blocks of positions added up.
#pragma once
#include "mixture_tokens.cuh"

namespace di4c::cuda {

__global__ void __launch_bounds__(kMaxThreads, kMinCtas) mixture_tickets_kernel(MixtureArgs p) {
  const int64_t blocks = ceil_div(p.D, kPositions), step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < p.B * blocks; i += step)
    *ticket_of(p, 0, i, blocks) = 0;
}

// sum_d weight_d row_d by a warp: lane by lane blocks of kPositions in double, then the blocks in order.
__device__ __forceinline__ double sum_over_positions(const float* row, const float* weight, int64_t b, int64_t D,
                                                     int lane) {
  double total = 0.0;
  for (int64_t first = 0; first < D; first += kWarp * kPositions) {
    double part = 0.0;
    for (int64_t d = first + lane * kPositions; d < first + (lane + 1) * kPositions && d < D; ++d) {
      const float w = weight_at(weight, b, D, d);
      if (w != 0.0f) part += static_cast<double>(w) * row[d];
    }
    for (int source = 0; source < kWarp; ++source) total += __shfl_sync(kFullWarp, part, source);
  }
  return total;
}

__device__ __forceinline__ double warp_max_double(double v) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(kFullWarp, v, step);
    v = other > v ? other : v;
  }
  return v;
}

// A warp finishes one (b, k), or one part of one b. Reads work, row and weight alone.
__global__ void __launch_bounds__(kMaxThreads, kMinCtas) mixture_finish_kernel(MixtureArgs p) {
  const int lane = threadIdx.x;
  const int64_t blocks = ceil_div(p.D, kPositions), sequences = p.L > 0 ? p.B * p.K : 0;
  for (int64_t i = first_row(); i < sequences + kParts * p.B; i += row_step()) {
    if (i >= sequences) {
      const int64_t n = i - sequences;
      const double sum = sum_over_positions(p.row + n * p.D, p.weight, n % p.B, p.D, lane);
      if (lane == 0) p.parts[n] = static_cast<float>(sum);
      continue;
    }
    const int64_t b = i / p.K, k = i % p.K;
    const auto add_up = [&](int64_t l) {
      double sum = 0.0;
      for (int64_t j = 0; j < blocks; ++j) sum += p.work[((b * blocks + j) * (p.L + 1) + l) * p.K + k];
      return sum;
    };
    const double mine = lane < p.L ? add_up(lane) : 0.0;
    const auto total = [&](int64_t l) { return l < kWarp ? mine : add_up(l); };
    double top = -DBL_MAX;
    float sum = 0.0f;
    for (int64_t l = lane; l < p.L; l += kWarp) top = total(l) > top ? total(l) : top;
    top = warp_max_double(top);
    for (int64_t l = lane; l < p.L; l += kWarp) sum += exp_nonpos(static_cast<float>(total(l) - top));
    sum = warp_sum(sum);
    for (int64_t l = lane; l < p.L; l += kWarp) {  // no component allows the sequence: no shares
      const float e = exp_nonpos(static_cast<float>(total(l) - top));
      p.share[(b * p.L + l) * p.K + k] = sum == 0.0f ? 0.0f : e / sum;
    }
    if (lane == 0) {
      const double correlation = top + (logf(sum) - logf(static_cast<float>(p.L)));
      p.correlation[i] = static_cast<float>(correlation);
      p.joint[i] = static_cast<float>(correlation + add_up(p.L));
    }
  }
}

}  // namespace di4c::cuda
