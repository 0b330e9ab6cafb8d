// Kernels that several families share, launched from common.cu: the log-sum-exp of every row, and the sum of row
// values over positions.
#pragma once
#include "online.cuh"

namespace di4c::cuda {

template <int kDType>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas)
lse_kernel(Logits x, const float* weight, float* lse, int64_t B, int64_t L, int64_t D, int64_t S) {
  __shared__ float scratch[kWarp];
  const Group group(scratch);
  for (int64_t i = first_row(); i < B * L * D; i += row_step()) {
    const int64_t d = i % D, l = i / D % L, b = i / D / L;
    Norm norm = {};
    if (weight_at(weight, b, D, d) != 0.0f) {
      const Row<kDType> row(x, b, l, d);
      norm = row_norm(row, row.head(S), S, group);
    }
    if (group.rank == 0) norm.keep(lse, B * L * D, i);
  }
}

// One warp sums the D values of one n: lane by lane blocks of kPositions in double, then the blocks in order.
__global__ void __launch_bounds__(kMaxThreads, kMinCtas)
weighted_sum_kernel(const float* row, const float* weight, float* out, int64_t N, int64_t L, int64_t D) {
  const int lane = threadIdx.x;
  for (int64_t n = first_row(); n < N; n += row_step()) {
    double total = 0.0;
    for (int64_t first = 0; first < D; first += kWarp * kPositions) {
      const int64_t begin = first + lane * kPositions;
      double part = 0.0;
      for (int64_t d = begin; d < begin + kPositions && d < D; ++d) {
        const float w = weight_at(weight, n / L, D, d);
        if (w != 0.0f) part += static_cast<double>(w) * row[n * D + d];
      }
      for (int source = 0; source < kWarp; ++source) total += __shfl_sync(kFullWarp, part, source);
    }
    if (lane == 0) out[n] = static_cast<float>(total);
  }
}

}  // namespace di4c::cuda
