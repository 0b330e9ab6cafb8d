// KL from a target (itself a mixture of T) to the mean of L components, per position.
//
//   kl_d = sum_s t_s (log t_s - log mean_l p_l(s)),   pull_l = sum_s t_s R_l(s),   R_l = p_l / sum_l' p_l'
//   dlogits_ls = w_d g (p_l(s) pull_l - t_s R_l(s))
// All of it through logarithms: a class far down every component's tail keeps its share.
#pragma once
#include "online.cuh"

namespace di4c::cuda {

constexpr int kTile = 2048;  // classes of a row worked on together: L rows of a tile stay in the L1 cache

// For kN classes from s on: log t, and log t - log sum_l p_l (-inf where no component has mass: R = 0 there).
template <class RowType, class Args, int kN>
__device__ __forceinline__ void log_target_and_ratio(const Args& p, int64_t b, int64_t d, int64_t s,
                                                     float (&log_target)[kN], float (&log_ratio)[kN]) {
  float log_sum[kN];
  log_components<AnyRow>(p.target, p.T, b, d, p.lse_target + b * p.T * p.D + d, p.D, s, log_target);
  log_components<RowType>(p.logits, p.L, b, d, p.lse + b * p.L * p.D + d, p.D, s, log_sum);
  const float log_count = logf(static_cast<float>(p.T));
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    log_target[i] -= log_count;
    const bool none = log_target[i] == -INFINITY || log_sum[i] == -INFINITY;
    log_ratio[i] = none ? -INFINITY : log_target[i] - log_sum[i];
  }
}

// A CTA takes one (b, d): per tile first its threads share the classes, then its warps the components.
template <int kDType>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas) mixture_kl_kernel(MixtureKlArgs p) {
  __shared__ float scratch[kWarp];
  __shared__ float ratio[kTile];
  const Group group(scratch);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const float log_count = logf(static_cast<float>(p.L));

  for_positions(p.B, p.D, [&](int64_t b, int64_t d) {
    const bool used = weight_at(p.weight, b, p.D, d) != 0.0f;
    for (int64_t l = group.rank; !used && l < p.L; l += group.size) p.pull[(b * p.L + l) * p.D + d] = 0.0f;
    float kl = 0.0f;
    for (int64_t begin = 0; used && begin < p.S; begin += kTile) {
      const int64_t n = p.S - begin < kTile ? p.S - begin : kTile;
      const Row<kDType> lead(p.logits, row_offset(p.logits, b, 0, d) + begin);
      sweep(lead.head(n), n, group.rank, group.size, [&](int64_t s, auto width) {
        constexpr int kN = decltype(width)::value;
        float log_target[kN], log_ratio[kN];
        log_target_and_ratio<Row<kDType>>(p, b, d, begin + s, log_target, log_ratio);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          const float t = exp_nonpos(log_target[j]);
          const bool missed = log_ratio[j] == -INFINITY;  // the target's mass on a class that no component allows
          if (t != 0.0f) kl += missed ? INFINITY : t * (log_ratio[j] + log_count);
          ratio[s + j] = log_ratio[j];
        }
      });
      __syncthreads();
      for (int64_t l = warp; l < p.L; l += warps) {
        const Row<kDType> row(p.logits, row_offset(p.logits, b, l, d) + begin);
        const int64_t n_row = (b * p.L + l) * p.D + d;
        float mine = 0.0f;
        for (int64_t s = lane; s < n; s += kWarp) mine += exp_nonpos(row[s] - p.lse[n_row] + ratio[s]);
        mine = warp_sum(mine);
        if (lane == 0) p.pull[n_row] = begin == 0 ? mine : p.pull[n_row] + mine;
      }
      __syncthreads();  // the next tile writes ratio
    }
    kl = group.sum(kl);
    if (group.rank == 0) p.row[b * p.D + d] = kl;
  });
}

// The gradient of all L rows of (b, d), from class `begin` on for a tile.
template <int kDType>
__device__ __forceinline__ void backward_tile(const MixtureKlBackwardArgs& p, int64_t b, int64_t d, int64_t begin,
                                              float w) {
  const int64_t n = p.S - begin < kTile ? p.S - begin : kTile;
  const int64_t head = GradRow<kDType>(p.grad, b * p.L * p.D + d, p.S, begin).head(n);
  const float scale = w == 0.0f ? 0.0f : w * p.grad_kl[b];
  sweep(head, n, threadIdx.x, blockDim.x, [&](int64_t offset, auto width) {
    constexpr int kN = decltype(width)::value;
    const int64_t s = begin + offset;
    float log_target[kN], log_ratio[kN], value[kN] = {};
    if (w != 0.0f) log_target_and_ratio<Row<kDType>>(p, b, d, s, log_target, log_ratio);
    for (int64_t l = 0; l < p.L; ++l) {
      const int64_t n_row = (b * p.L + l) * p.D + d;
      if (w != 0.0f) {
        const float lse = p.lse[n_row], pull = p.pull[n_row];
        Row<kDType>(p.logits, b, l, d).load(s, value);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          const float log_prob = value[j] - lse;
          value[j] = scale * (exp_nonpos(log_prob) * pull - exp_nonpos(log_prob + log_ratio[j]));
        }
      }
      GradRow<kDType>(p.grad, n_row, p.S).store(s, value);
    }
  });
}

// A CTA takes one tile of one (b, d).
template <int kDType>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas) mixture_kl_backward_kernel(MixtureKlBackwardArgs p) {
  for_positions(p.B, p.D, [&](int64_t b, int64_t d) {
    const float w = weight_at(p.weight, b, p.D, d);
    for (int64_t begin = int64_t{blockIdx.z} * kTile; begin < p.S; begin += int64_t{gridDim.z} * kTile)
      backward_tile<kDType>(p, b, d, begin, w);
  });
}

}  // namespace di4c::cuda
