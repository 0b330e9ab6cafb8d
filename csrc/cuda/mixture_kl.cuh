// KL from a target (itself a mixture of T) to the mean of L components, per position.
//
//   kl_d = sum_s t_s (log t_s - log mean_l p_l(s)),   pull_l = sum_s t_s R_l(s),   R_l = p_l / sum_l' p_l'
//   dlogits_ls = w_d g (p_l(s) pull_l - t_s R_l(s))
// All of it through logarithms: a class far down every component's tail keeps its share.
#pragma once
#include "online.cuh"

namespace di4c::cuda {

constexpr int kTile = 2048;  // classes of a row worked on together: L rows of a tile stay in the L1 cache

// For kN classes from s on: log t, the components' largest log-probability top, and mass = sum_l p_l / exp(top), so
// that R_l = exp(log p_l - top) / mass is right to its last digits however far down the class lies; 0 where no
// component has mass.
template <class RowType, class Args, int kN>
__device__ __forceinline__ void target_and_components(const Args& p, int64_t b, int64_t d, int64_t s,
                                                      float (&log_target)[kN], float (&top)[kN], float (&mass)[kN]) {
  log_components<AnyRow>(p.target, p.lse_target, p.B, p.T, p.D, b, d, s, log_target, mass);
  const float log_count = logf(static_cast<float>(p.T));
#pragma unroll
  for (int i = 0; i < kN; ++i) log_target[i] += logf(mass[i]) - log_count;
  log_components<RowType>(p.logits, p.lse, p.B, p.L, p.D, b, d, s, top, mass);
}

// A CTA takes one (b, d): per tile first its threads share the classes, then its warps the components.
template <int kDType>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas) mixture_kl_kernel(MixtureKlArgs p) {
  __shared__ float scratch[kWarp];
  __shared__ float tops[kTile], shares[kTile];  // of each class: top, t / mass
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
        float log_target[kN], top[kN], mass[kN];
        target_and_components<Row<kDType>>(p, b, d, begin + s, log_target, top, mass);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          const float t = exp_nonpos(log_target[j]);
          const bool missed = mass[j] == 0.0f;  // the target's mass on a class that no component allows
          if (t != 0.0f) kl += missed ? INFINITY : t * ((log_target[j] - top[j]) - (logf(mass[j]) - log_count));
          tops[s + j] = top[j];
          shares[s + j] = missed ? 0.0f : t / mass[j];
        }
      });
      __syncthreads();
      for (int64_t l = warp; l < p.L; l += warps) {
        const Row<kDType> row(p.logits, row_offset(p.logits, b, l, d) + begin);
        const int64_t n_row = (b * p.L + l) * p.D + d;
        const Norm norm = Norm::kept(p.lse, p.B * p.L * p.D, n_row);
        float mine = 0.0f;
        for (int64_t s = lane; s < n; s += kWarp) mine += exp_nonpos(norm.log_prob(row[s]) - tops[s]) * shares[s];
        mine = warp_sum(mine);
        if (lane == 0) p.pull[n_row] = begin == 0 ? mine : p.pull[n_row] + mine;
      }
      __syncthreads();  // the next tile writes tops and shares
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
    float top[kN], share[kN], value[kN] = {};  // share: t / mass
    if (w != 0.0f) {
      float log_target[kN], mass[kN];
      target_and_components<Row<kDType>>(p, b, d, s, log_target, top, mass);
#pragma unroll
      for (int j = 0; j < kN; ++j) share[j] = mass[j] == 0.0f ? 0.0f : exp_nonpos(log_target[j]) / mass[j];
    }
    for (int64_t l = 0; l < p.L; ++l) {
      const int64_t n_row = (b * p.L + l) * p.D + d;
      if (w != 0.0f) {
        const Norm norm = Norm::kept(p.lse, p.B * p.L * p.D, n_row);
        const float pull = p.pull[n_row];
        Row<kDType>(p.logits, b, l, d).load(s, value);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          const float log_prob = norm.log_prob(value[j]);
          value[j] = scale * (exp_nonpos(log_prob) * pull - exp_nonpos(log_prob - top[j]) * share[j]);
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
