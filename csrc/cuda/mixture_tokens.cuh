// Log-probability of K sequences under the mixture, and its correlation part.
//
//   a_lkd = log p_l^d(x_k^d),   lme_kd = log mean_l exp(a_lkd)
//   correlation_k = LME_l c_lk,  c_lk = sum_d w_d (a_lkd - lme_kd);   joint_k = correlation_k + sum_d w_d lme_kd
// A token that no component allows adds nothing to c, -inf to joint. c over a block of kPositions positions is summed
// in double into work[b, block, l, k], sum w lme into work[b, block, L, k]; mixture_finish.cuh adds the blocks in
// order.
#pragma once
#include "mixture.cuh"

namespace di4c::cuda {

// The lanes of a warp that share one sequence: as many as there are components, and no fewer than that asks for.
__device__ __forceinline__ int lanes_for(int64_t L) {
  int lanes = 1;
  while (lanes < kWarp && lanes < L) lanes *= 2;
  return lanes;
}

// Over groups of `lanes` neighbouring lanes, the same in each of them.
__device__ __forceinline__ float lanes_max(float v, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(kFullWarp, v, step));
  return v;
}
__device__ __forceinline__ float lanes_sum(float v, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(kFullWarp, v, step);
  return v;
}

// log p_l(token): NaN for a token that is no state. Two roundings apart from the float below it, since thousands of
// positions are added up.
template <int kDType>
__device__ __forceinline__ double exact_log_prob(const Components<kDType>& logits, int64_t l, int64_t token) {
  if (!is_state(token, logits.S)) return NAN;
  const Norm norm = logits.norm(l);
  return (static_cast<double>(logits.row(l)[token]) - norm.max) - norm.log_sum;
}

// log sum_l exp(a_l) of the components dealt to `lanes` lanes, in two parts; log_sum is -inf where no component allows
// the token, and then max is of no use.
template <class LogProb>
__device__ __forceinline__ Norm over_components(int64_t L, int lane, int lanes, LogProb log_prob) {
  float top = -FLT_MAX, sum = 0.0f;
#pragma unroll 1
  for (int64_t l = lane; l < L; l += lanes) top = fmaxf(top, static_cast<float>(log_prob(l)));
  top = lanes_max(top, lanes);
#pragma unroll 1
  for (int64_t l = lane; l < L; l += lanes) sum += exp_quick(static_cast<float>(log_prob(l) - top));
  return {top, logf(lanes_sum(sum, lanes))};
}

// All sequences over one block of positions: a CTA's warps take the sequences, lanes the components. kAtOnce: positions
// whose rows are being fetched together.
template <int kDType, int kAtOnce>
__device__ __forceinline__ void sequences_of_block(const MixtureArgs& p, int64_t b, int64_t block, int64_t blocks) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, warps = blockDim.x * blockDim.y / kWarp;
  const int lanes = lanes_for(p.L), lane = thread % kWarp % lanes, per_warp = kWarp / lanes;
  const float log_count = logf(static_cast<float>(p.L));
  const int64_t begin = block * kPositions, end = begin + kPositions < p.D ? begin + kPositions : p.D;
  double* work = p.work + (b * blocks + block) * (p.L + 1) * p.K;

  for (int64_t k0 = int64_t{thread / kWarp} * per_warp; k0 < p.K; k0 += int64_t{warps} * per_warp) {
    const int64_t mine = k0 + thread % kWarp / lanes, k = mine < p.K ? mine : p.K - 1;  // spare lanes follow the last
    const bool writes = mine < p.K && lane < p.L;
    double marginal = 0.0, centred = 0.0;  // the latter of component `lane`; of others it is added up in work
#pragma unroll 1
    for (int64_t l = lane + lanes; writes && l < p.L; l += lanes) work[l * p.K + k] = 0.0;
    for (int64_t d0 = begin; d0 < end; d0 += kAtOnce) {
      double a[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        a[i] = -INFINITY;
        const int64_t d = d0 + i;
        if (d >= end || lane >= p.L || weight_at(p.weight, b, p.D, d) == 0.0f) continue;
        const Components<kDType> logits(p.logits, p.lse, p.B, p.L, p.D, p.S, b, d);
        a[i] = exact_log_prob(logits, lane, token_of(p, b, k, d));
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t d = d0 + i;
        const float w = d < end ? weight_at(p.weight, b, p.D, d) : 0.0f;
        if (w == 0.0f) continue;  // for the whole warp
        const int64_t token = token_of(p, b, k, d);
        const Components<kDType> logits(p.logits, p.lse, p.B, p.L, p.D, p.S, b, d);
        const auto log_prob = [&](int64_t l) { return l < kWarp ? a[i] : exact_log_prob(logits, l, token); };
        const Norm all = over_components(p.L, lane, lanes, log_prob);
        const double log_mean = static_cast<double>(all.log_sum) - log_count;
        const bool dead = all.log_sum == -INFINITY;
        marginal += w * (dead ? log_mean : all.max + log_mean);
        if (dead) continue;
        centred += w * ((a[i] - all.max) - log_mean);
#pragma unroll 1
        for (int64_t l = lane + lanes; writes && l < p.L; l += lanes)
          work[l * p.K + k] += w * ((log_prob(l) - all.max) - log_mean);
      }
    }
    if (writes) work[lane * p.K + k] = centred;
    if (writes && lane == 0) work[p.L * p.K + k] = marginal;
  }
}

// How many positions of a block are done is counted where its last sum will lie.
__device__ __forceinline__ unsigned* ticket_of(const MixtureArgs& p, int64_t b, int64_t block, int64_t blocks) {
  return reinterpret_cast<unsigned*>(p.work + ((b * blocks + block) * (p.L + 1) + p.L) * p.K);
}

// A CTA has done `count` positions from d on: when it did the block's last, their rows still lie in the L2 cache, and
// it adds up the sequences over the block.
template <int kDType, int kAtOnce>
__device__ __forceinline__ void finish_block(const MixtureArgs& p, int64_t b, int64_t d, int64_t count,
                                             unsigned& arrived) {
  const int64_t blocks = ceil_div(p.D, kPositions), block = d / kPositions, begin = block * kPositions;
  const int64_t all = begin + kPositions < p.D ? kPositions : p.D - begin;
  __threadfence();  // the normalisers kept, before the count that tells of them
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    const unsigned n = static_cast<unsigned>(count);
    arrived = atomicAdd(ticket_of(p, b, block, blocks), n) + n;
  }
  __syncthreads();
  if (arrived == all) {
    __threadfence();  // the count, before the normalisers it tells of
    sequences_of_block<kDType, kAtOnce>(p, b, block, blocks);
  }
  __syncthreads();  // `arrived` is written again
}

}  // namespace di4c::cuda
