// Log-probability of K sequences under a mixture of L product distributions, and its correlation part.
//
//   a_lkd = log p_l^d(x_k^d),   lme_kd = log mean_l exp(a_lkd)
//   correlation_k = LME_l c_lk,  c_lk = sum_d w_d (a_lkd - lme_kd);   joint_k = correlation_k + sum_d w_d lme_kd
// A token that no component allows adds nothing to c, -inf to joint. c over a block of kPositions positions is
// summed in double into work[b, block, l, k], sum w lme into work[b, block, L, k]; a second kernel adds the
// blocks in order.
//
// Backward, rho_lkd = softmax_l a, share_lk = softmax_l c:
//   dlogits_lds = sum_k coef_lkd (1[s = x_k^d] - p_l^d(s)),  coef = w_d ((gj_k + gc_k) share_lk - gc_k rho_lkd),
// and coef = 0 for a token that no component allows.
#pragma once
#include "online.cuh"

namespace di4c::cuda {

constexpr int kTokens = 512;  // sequences one backward launch handles; their tokens lie in shared memory

__device__ __forceinline__ bool is_state(int64_t token, int64_t S) { return token >= 0 && token < S; }

// The normaliser of row (b, l, d), as kept by the forward's first launch.
template <class Args>
__device__ __forceinline__ Norm norm_at(const Args& p, int64_t b, int64_t l, int64_t d) {
  return Norm::kept(p.lse, p.B * p.L * p.D, (b * p.L + l) * p.D + d);
}

// log p_l(token) at (b, d), NaN for a token that is no state.
template <class Args>
__device__ __forceinline__ float log_prob_at(const Args& p, int64_t b, int64_t l, int64_t d, int64_t token) {
  return is_state(token, p.S) ? norm_at(p, b, l, d).log_prob(AnyRow(p.logits, b, l, d)[token]) : NAN;
}

// log sum_l exp(a_l), the L components dealt to the lanes of a warp.
template <class Args>
__device__ __forceinline__ float warp_lse(const Args& p, int64_t b, int64_t d, int64_t token, int lane) {
  Online mine;
  for (int64_t l = lane; l < p.L; l += kWarp) mine.add(log_prob_at(p, b, l, d, token));
  return mine.merged_in_warp().log();
}

// A CTA takes kPositions positions of one b, a warp one k at a time, a lane every 32nd l.
__global__ void __launch_bounds__(kMaxThreads, kMinCtas) mixture_positions_kernel(MixtureLogProbArgs p) {
  const int lane = threadIdx.x;
  const int64_t blocks = ceil_div(p.D, kPositions);
  const float log_count = logf(static_cast<float>(p.L));
  for_positions(p.B, blocks, [&](int64_t b, int64_t block) {
    const int64_t begin = block * kPositions, end = begin + kPositions < p.D ? begin + kPositions : p.D;
    double* work = p.work + (b * blocks + block) * (p.L + 1) * p.K;
    for (int64_t k = threadIdx.y; k < p.K; k += blockDim.y) {
      double marginal = 0.0;
      for (int64_t l = lane; l < p.L; l += kWarp) work[l * p.K + k] = 0.0;
      for (int64_t d = begin; d < end; ++d) {
        const double w = weight_at(p.weight, b, p.D, d);
        if (w == 0.0) continue;
        const int64_t token = p.tokens[(b * p.K + k) * p.D + d];
        const float lme = warp_lse(p, b, d, token, lane) - log_count;
        marginal += w * lme;
        if (lme == -INFINITY) continue;
        for (int64_t l = lane; l < p.L; l += kWarp) {
          const float a = log_prob_at(p, b, l, d, token);
          work[l * p.K + k] += w * (static_cast<double>(a) - lme);
        }
      }
      if (lane == 0) work[p.L * p.K + k] = marginal;
    }
  });
}

// A warp finishes one (b, k).
__global__ void __launch_bounds__(kMaxThreads, kMinCtas) mixture_finish_kernel(MixtureLogProbArgs p) {
  const int lane = threadIdx.x;
  const int64_t blocks = ceil_div(p.D, kPositions);
  for (int64_t i = first_row(); i < p.B * p.K; i += row_step()) {
    const int64_t b = i / p.K, k = i % p.K;
    const auto total = [&](int64_t l) {
      double sum = 0.0;
      for (int64_t j = 0; j < blocks; ++j) sum += p.work[((b * blocks + j) * (p.L + 1) + l) * p.K + k];
      return sum;
    };
    float top = -FLT_MAX, sum = 0.0f;
    for (int64_t l = lane; l < p.L; l += kWarp) top = fmaxf(top, static_cast<float>(total(l)));
    top = warp_max(top);
    for (int64_t l = lane; l < p.L; l += kWarp) sum += exp_nonpos(static_cast<float>(total(l) - top));
    sum = warp_sum(sum);
    for (int64_t l = lane; l < p.L; l += kWarp) {  // no component allows the sequence: no shares
      const float e = exp_nonpos(static_cast<float>(total(l) - top));
      p.share[(b * p.L + l) * p.K + k] = sum == 0.0f ? 0.0f : e / sum;
    }
    if (lane == 0) {
      const double correlation = static_cast<double>(top) + (logf(sum) - logf(static_cast<float>(p.L)));
      p.correlation[i] = static_cast<float>(correlation);
      p.joint[i] = static_cast<float>(correlation + total(p.L));
    }
  }
}

// The K tokens of one (b, d): built once, used for all L rows.
struct TokenTable {
  int64_t token[kTokens];
  float lse[kTokens];    // over l, of a
  int next[kTokens];     // the next k with the same token, or -1
  bool first[kTokens];   // no earlier k has this token
};

// Sequences k0 .. k0 + count of the gradient; the first launch writes it, further ones (K > kTokens) add to it.
template <int kDType>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas)
mixture_log_prob_backward_kernel(MixtureLogProbBackwardArgs p, int64_t k0, int count) {
  __shared__ float scratch[kWarp];
  __shared__ TokenTable table;
  const Group group(scratch);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;

  for_positions(p.B, p.D, [&](int64_t b, int64_t d) {
    const float w = weight_at(p.weight, b, p.D, d);
    __syncthreads();  // the table of the (b, d) before is done with
    if (w != 0.0f) {
      for (int k = thread; k < count; k += threads) table.token[k] = p.tokens[(b * p.K + k0 + k) * p.D + d];
      __syncthreads();
      for (int k = thread / kWarp; k < count; k += threads / kWarp) {
        const float lse = warp_lse(p, b, d, table.token[k], thread % kWarp);
        if (thread % kWarp == 0) table.lse[k] = lse;
      }
      for (int k = thread; k < count; k += threads) {
        bool first = true;
        int next = -1;
        for (int j = 0; j < k; ++j) first = first && table.token[j] != table.token[k];
        for (int j = count - 1; j > k; --j) next = table.token[j] == table.token[k] ? j : next;
        table.first[k] = first;
        table.next[k] = next;
      }
      __syncthreads();
    }

    for (int64_t l = threadIdx.y; l < p.L; l += blockDim.y) {
      const GradRow<kDType> grad(p.grad, (b * p.L + l) * p.D + d, p.S);
      const int64_t head = grad.head(p.S);
      const bool add = k0 > 0;
      if (w == 0.0f || count == 0) {
        if (!add) {
          sweep(head, p.S, group.rank, group.size, [&](int64_t s, auto width) {
            const float zero[decltype(width)::value] = {};
            grad.store(s, zero);
          });
        }
        continue;
      }
      const Row<kDType> row(p.logits, b, l, d);
      const Norm norm = norm_at(p, b, l, d);
      const auto coefficient = [&](int k) {
        // A token that no component allows does not enter the correlation, nor any gradient.
        if (table.lse[k] == -INFINITY) return 0.0f;
        const int64_t n = b * p.K + k0 + k;
        const float gj = p.grad_joint[n], gc = p.grad_correlation[n];
        const float share = p.share[(b * p.L + l) * p.K + k0 + k];
        const float a = log_prob_at(p, b, l, d, table.token[k]);
        return w * (gj * share + gc * (share - exp_nonpos(a - table.lse[k])));
      };

      float mine = 0.0f;
      for (int k = group.rank; k < count; k += group.size) mine += coefficient(k);
      const float pull = group.sum(mine);
      const auto gradient = [&](float x) { return -pull * exp_nonpos(norm.log_prob(x)); };

      // The gradient of a class that tokens name, as one expression; it replaces what the sweep writes there.
      const auto at_token = [&](int k) {
        const int64_t s = table.token[k];
        float value = gradient(row[s]);
        for (int j = k; j >= 0; j = table.next[j]) value += coefficient(j);
        return value;
      };
      sweep(head, p.S, group.rank, group.size, [&](int64_t s, auto width) {
        constexpr int kN = decltype(width)::value;
        float x[kN];
        row.load(s, x);
#pragma unroll
        for (int j = 0; j < kN; ++j) x[j] = gradient(x[j]) + (add ? grad[s + j] : 0.0f);
        grad.store(s, x);
      });
      group.sync();
      for (int k = group.rank; k < count; k += group.size) {
        const int64_t s = table.token[k];
        if (!table.first[k] || !is_state(s, p.S)) continue;
        grad.set(s, add ? grad[s] + at_token(k) - gradient(row[s]) : at_token(k));
      }
    }
  });
}

}  // namespace di4c::cuda
