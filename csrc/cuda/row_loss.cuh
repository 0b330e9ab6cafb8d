// Losses between one row of logits and its target row: p = softmax(logits), t = softmax(target).
//
// Forward: a first sweep of the row gives both normalisers, a second the loss and the one scalar c the
// gradient needs; all are kept in stats, so that backward is one read and one write. What shared memory holds of the
// rows is read from memory but once.
//
//   kind             loss                                   c                   dlogits
//   forward KL       sum t (log t - log p)                                      p - t
//   reverse KL       sum p (log p - log t)                  the loss            p (log p - log t - c)
//   Jensen-Shannon   (KL(t || m) + KL(p || m)) / 2          sum p h             p (h - c) / 2,  h = log(p / m)
//   total variation  sum |p - t| / 2                        sum p sign(p - t)   p (sign(p - t) - c) / 2
//   cross entropy    -log p(token)                                              p - 1[s = token]
// A class without mass adds nothing, whatever the other distribution says of it.
#pragma once
#include "stream.cuh"

namespace di4c::cuda {

// log(p / m), m = (p + t) / 2, for p > 0. Where p and t nearly agree it is small, and must be so to its last bit.
__device__ __forceinline__ float log_over_average(float p, float t) {
  const float balance = (p - t) / (p + t);
  return fabsf(balance) < 0.5f ? log1pf(balance) : logf(2.0f * (p / (p + t)));
}

__device__ __forceinline__ float sign(float v) { return v > 0.0f ? 1.0f : v < 0.0f ? -1.0f : v; }

// Adds one class, of log-probabilities lp and lt, to the row's loss and scalar.
template <int kKind>
__device__ __forceinline__ void add_class(float lp, float lt, float& loss, float& scalar) {
  const float p = exp_quick(lp), t = exp_quick(lt);
  if (kKind == kForwardKl) {
    loss += t == 0.0f ? 0.0f : t * (lt - lp);
  } else if (kKind == kReverseKl) {
    loss += p == 0.0f ? 0.0f : p * (lp - lt);
  } else if (kKind == kJensenShannon) {
    const float h = p == 0.0f ? 0.0f : p * log_over_average(p, t);
    loss += 0.5f * (h + (t == 0.0f ? 0.0f : t * log_over_average(t, p)));
    scalar += h;
  } else if (kKind == kTotalVariation) {
    loss += 0.5f * fabsf(p - t);
    scalar += p * sign(p - t);
  }
}

// The derivative of the row's loss by the logit of one class.
template <int kKind>
__device__ __forceinline__ float class_gradient(float lp, float lt, float scalar) {
  const float p = exp_quick(lp), t = kKind == kCrossEntropy ? 0.0f : exp_quick(lt);
  if (kKind == kCrossEntropy) return p;  // less 1 at the token
  if (kKind == kForwardKl) return p - t;
  if (p == 0.0f) return 0.0f;
  if (kKind == kReverseKl) return p * (lp - lt - scalar);
  if (kKind == kJensenShannon) return 0.5f * p * (log_over_average(p, t) - scalar);
  return 0.5f * p * (sign(p - t) - scalar);
}

// Where a thread keeps the `kept` vectors of the row and of its target.
template <int kDType>
struct Stages {
  Stage<kDType> row, target;

  __device__ __forceinline__ Stages(uint4* memory, int kept) {
    const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
    row = {memory + thread, kept, threads};
    target = {row.words + kept * Words<kDType>::kCount * threads, kept, threads};
  }
};

// The log-sum-exps of a slice of the row and of its target's.
template <int kDType, class Target>
__device__ __forceinline__ void first_sweep(const Pair<kDType, Target>& pair, const Group& group,
                                            const Stages<kDType>& stages, Online& row, Online& target) {
  Online mine, others;
  pair.template sweep<true>(group, stages.row, stages.target, [&](const auto& x, const auto& y) {
    mine.add(x);
    others.add(y);
  });
  row = mine.merged(group);
  target = others.merged(group);
}

// The loss and the scalar of a slice.
template <int kKind, int kDType, class Target>
__device__ __forceinline__ void second_sweep(const Pair<kDType, Target>& pair, const Group& group,
                                             const Stages<kDType>& stages, const Norm& norm, const Norm& target_norm,
                                             float& loss, float& scalar) {
  float mine = 0.0f, others = 0.0f;
  pair.template sweep<false>(group, stages.row, stages.target, [&](const auto& x, const auto& y) {
#pragma unroll
    for (int j = 0; j < static_cast<int>(sizeof x / sizeof x[0]); ++j)
      add_class<kKind>(norm.log_prob(x[j]), target_norm.log_prob(y[j]), mine, others);
  });
  loss = group.sum(mine);
  scalar = kKind == kReverseKl ? loss : group.sum(others);
}

// f(target): of the logits' dtype, known when compiled, or of another.
template <int kDType, class F>
__device__ __forceinline__ void with_target(const Logits& x, int64_t b, int64_t d, F f) {
  if (x.dtype == kDType) {
    f(Row<kDType>(x, b, 0, d));
  } else {
    f(AnyRow(x, b, 0, d));
  }
}

// NaN for a token that is no state.
template <int kDType>
__device__ __forceinline__ float cross_entropy(const RowLossArgs& a, int64_t b, int64_t d, const Row<kDType>& row,
                                               const Norm& norm) {
  const int64_t token = a.tokens[b * a.D + d];
  return token >= 0 && token < a.S ? -norm.log_prob(row[token]) : NAN;
}

__device__ __forceinline__ void keep(const RowLossArgs& a, int64_t i, const Norm& norm, const Norm& target_norm,
                                     float loss, float scalar) {
  const int64_t rows = a.B * a.L * a.D;
  a.row[i] = loss;
  norm.keep(a.stats, rows, i);
  target_norm.keep(a.stats + 2 * rows, rows, i);
  a.stats[4 * rows + i] = scalar;
}

template <int kDType, int kKind>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas) row_loss_kernel(RowLossArgs a, int kept) {
  DI4C_SHARED(Scratch, scratch);
  DI4C_DYNAMIC_SHARED(uint4, memory);
  const Group group(scratch);
  const Stages<kDType> stages(memory, kept);
  const int64_t rows = a.B * a.L * a.D;
  for (int64_t i = first_row(); i < rows; i += row_step()) {
    const int64_t d = i % a.D, l = i / a.D % a.L, b = i / a.D / a.L;
    Norm norm = {}, target_norm = {};
    float loss = 0.0f, scalar = 0.0f;
    if (weight_at(a.weight, b, a.D, d) != 0.0f) {
      const Row<kDType> row(a.logits, b, l, d);
      if constexpr (kKind == kCrossEntropy) {
        norm = norm_of(slice_online(row, 0, a.S, group));
        loss = cross_entropy(a, b, d, row, norm);
      } else {
        with_target<kDType>(a.target, b, d, [&](const auto& target) {
          const Pair<kDType, std::decay_t<decltype(target)>> pair(row, target, 0, a.S);
          Online all, target_all;
          first_sweep(pair, group, stages, all, target_all);
          norm = norm_of(all);
          target_norm = norm_of(target_all);
          second_sweep<kKind>(pair, group, stages, norm, target_norm, loss, scalar);
        });
      }
    }
    if (group.rank == 0) keep(a, i, norm, target_norm, loss, scalar);
  }
}

// A ticket's CTAs part after the first sweep, and take the second in a launch of its own.
enum Sweeps : int { kBoth, kFirstOnly, kSecondOnly };

// Long rows.
template <int kDType, int kKind>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas)
row_loss_split_kernel(RowLossArgs a, int kept, Split split, Sweeps sweeps) {
  DI4C_SHARED(Scratch, scratch);
  DI4C_SHARED(PartTable<4>, table);
  DI4C_DYNAMIC_SHARED(uint4, memory);
  const Group group(scratch);
  const Stages<kDType> stages(memory, kept);
  Team<4> team(split, table);
  const int64_t rows = a.B * a.L * a.D, length = part_length(a.S, split.parts);
  for (int64_t i = team.first_row(); i < rows; i += team.row_step()) {
    const int64_t d = i % a.D, l = i / a.D % a.L, b = i / a.D / a.L;
    Norm norm = {}, target_norm = {};
    float loss = 0.0f, scalar = 0.0f;
    bool holds = team.leads();
    if (weight_at(a.weight, b, a.D, d) != 0.0f) {
      const Row<kDType> row(a.logits, b, l, d);
      if constexpr (kKind == kCrossEntropy) {
        team.each_part([&](int part) {
          const int64_t begin = part * length;
          const Online mine = slice_online(row, begin, a.S - begin < length ? a.S - begin : length, group);
          team.put(i, part, {mine.max, mine.sum, 0.0f, 0.0f});
        });
        holds = team.meet(i);
        if (holds) {
          norm = norm_of_parts(team, 0);
          loss = cross_entropy(a, b, d, row, norm);
        }
      } else {
        with_target<kDType>(a.target, b, d, [&](const auto& target) {
          using Slice = Pair<kDType, std::decay_t<decltype(target)>>;
          const auto slice = [&](int part) {
            const int64_t begin = part * length;
            return Slice(row, target, begin, a.S - begin < length ? a.S - begin : length);
          };
          if (sweeps == kSecondOnly) {
            norm = Norm::kept(a.stats, rows, i);
            target_norm = Norm::kept(a.stats + 2 * rows, rows, i);
          } else {
            team.each_part([&](int part) {
              Online mine, others;
              first_sweep(slice(part), group, stages, mine, others);
              team.put(i, part, {mine.max, mine.sum, others.max, others.sum});
            });
            holds = team.meet(i);
            if (holds) {
              norm = norm_of_parts(team, 0);
              target_norm = norm_of_parts(team, 2);
            }
          }
          if (sweeps == kFirstOnly) return;
          team.each_part([&](int part) {
            float of_loss, of_scalar;
            second_sweep<kKind>(slice(part), group, stages, norm, target_norm, of_loss, of_scalar);
            team.put(i, part, {of_loss, of_scalar, 0.0f, 0.0f});
          });
          holds = team.meet(i);
          for (int part = 0; holds && part < split.parts; ++part) {
            loss += team.get(part, 0);
            scalar += team.get(part, 1);
          }
        });
      }
    }
    if (group.rank == 0 && team.writes(holds)) keep(a, i, norm, target_norm, loss, scalar);
  }
}

// Slice blockIdx.y of gridDim.y of each row.
template <int kDType, int kKind>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas) row_loss_backward_kernel(RowLossBackwardArgs a) {
  DI4C_SHARED(Scratch, scratch);
  const Group group(scratch);
  const int64_t rows = a.B * a.L * a.D, length = part_length(a.S, gridDim.y);
  const int64_t begin = blockIdx.y * length, n = a.S - begin < length ? a.S - begin : length;
  for (int64_t i = first_row(); i < rows; i += row_step()) {
    const int64_t d = i % a.D, l = i / a.D % a.L, b = i / a.D / a.L;
    const float w = weight_at(a.weight, b, a.D, d);
    const GradRow<kDType> grad(a.grad, i, a.S, begin);
    if (w == 0.0f) {
      sweep(grad.head(n), n, group.rank, group.size, [&](int64_t s, auto width) {
        const float zero[decltype(width)::value] = {};
        grad.store(s, zero);
      });
      continue;
    }
    const Row<kDType> row(a.logits, b, l, d);
    const int64_t token = kKind == kCrossEntropy ? a.tokens[b * a.D + d] : 0;
    const float scale = token >= 0 && token < a.S ? w * a.grad_loss[b * a.L + l] : NAN;
    const Norm norm = Norm::kept(a.stats, rows, i), target_norm = Norm::kept(a.stats + 2 * rows, rows, i);
    const float scalar = a.stats[4 * rows + i];
    const AnyRow target(a.target, b, 0, d);
    sweep(grad.head(n), n, group.rank, group.size, [&](int64_t s, auto width) {
      constexpr int kN = decltype(width)::value;
      float x[kN], y[kN] = {};
      row.load(begin + s, x);
      if (kKind != kCrossEntropy) target.load(begin + s, y);
#pragma unroll
      for (int j = 0; j < kN; ++j)
        x[j] = scale * class_gradient<kKind>(norm.log_prob(x[j]), target_norm.log_prob(y[j]), scalar);
      grad.store(s, x);
    });
    if (kKind == kCrossEntropy) {
      group.sync();  // the sweep has written the token's class
      if (group.rank == 0 && token >= begin && token < begin + n)
        grad.set(token - begin, scale * (exp_quick(norm.log_prob(row[token])) - 1.0f));
    }
  }
}

// The sum of row values over positions: out[n] = sum_d weight[n / L, d] row[n, d]. One warp sums the D values of one n:
// lane by lane blocks of kPositions in double, then the blocks in order.
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
