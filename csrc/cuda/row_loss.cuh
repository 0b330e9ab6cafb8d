// Losses between one row of logits and its target row: p = softmax(logits), t = softmax(target).
//
// Forward: a first sweep of the row gives both normalisers, a second the loss and the one scalar c the
// gradient needs; all are kept in stats, so that backward is one read and one write.
//
//   kind             loss                                   c                   dlogits
//   forward KL       sum t (log t - log p)                                      p - t
//   reverse KL       sum p (log p - log t)                  the loss            p (log p - log t - c)
//   Jensen-Shannon   (KL(t || m) + KL(p || m)) / 2          sum p h             p (h - c) / 2,  h = log(p / m)
//   total variation  sum |p - t| / 2                        sum p sign(p - t)   p (sign(p - t) - c) / 2
//   cross entropy    -log p(token)                                              p - 1[s = token]
// A class without mass adds nothing, whatever the other distribution says of it.
#pragma once
#include "online.cuh"

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
  const float p = exp_nonpos(lp), t = exp_nonpos(lt);
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
  const float p = exp_nonpos(lp), t = kKind == kCrossEntropy ? 0.0f : exp_nonpos(lt);
  if (kKind == kCrossEntropy) return p;  // less 1 at the token
  if (kKind == kForwardKl) return p - t;
  if (p == 0.0f) return 0.0f;
  if (kKind == kReverseKl) return p * (lp - lt - scalar);
  if (kKind == kJensenShannon) return 0.5f * p * (log_over_average(p, t) - scalar);
  return 0.5f * p * (sign(p - t) - scalar);
}

template <int kDType, int kKind>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas) row_loss_kernel(RowLossArgs a) {
  __shared__ float scratch[kWarp];
  const Group group(scratch);
  const int64_t rows = a.B * a.L * a.D;
  for (int64_t i = first_row(); i < rows; i += row_step()) {
    const int64_t d = i % a.D, l = i / a.D % a.L, b = i / a.D / a.L;
    Norm norm = {}, target_norm = {};
    float loss = 0.0f, scalar = 0.0f;
    if (weight_at(a.weight, b, a.D, d) != 0.0f) {
      const Row<kDType> row(a.logits, b, l, d);
      const int64_t head = row.head(a.S);
      norm = row_norm(row, head, a.S, group);
      if (kKind == kCrossEntropy) {
        const int64_t token = a.tokens[b * a.D + d];
        loss = token >= 0 && token < a.S ? -norm.log_prob(row[token]) : NAN;
      } else {
        const AnyRow target(a.target, b, 0, d);
        target_norm = row_norm(target, head, a.S, group);
        sweep(head, a.S, group.rank, group.size, [&](int64_t s, auto width) {
          float x[decltype(width)::value], y[decltype(width)::value];
          row.load(s, x);
          target.load(s, y);
#pragma unroll
          for (int j = 0; j < decltype(width)::value; ++j)
            add_class<kKind>(norm.log_prob(x[j]), target_norm.log_prob(y[j]), loss, scalar);
        });
        loss = group.sum(loss);
        scalar = kKind == kReverseKl ? loss : group.sum(scalar);
      }
    }
    if (group.rank == 0) {
      a.row[i] = loss;
      norm.keep(a.stats, rows, i);
      target_norm.keep(a.stats + 2 * rows, rows, i);
      a.stats[4 * rows + i] = scalar;
    }
  }
}

template <int kDType, int kKind>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas) row_loss_backward_kernel(RowLossBackwardArgs a) {
  __shared__ float scratch[kWarp];
  const Group group(scratch);
  const int64_t rows = a.B * a.L * a.D;
  for (int64_t i = first_row(); i < rows; i += row_step()) {
    const int64_t d = i % a.D, l = i / a.D % a.L, b = i / a.D / a.L;
    const float w = weight_at(a.weight, b, a.D, d);
    const GradRow<kDType> grad(a.grad, i, a.S);
    if (w == 0.0f) {
      sweep(grad.head(a.S), a.S, group.rank, group.size, [&](int64_t s, auto width) {
        const float zero[decltype(width)::value] = {};
        grad.store(s, zero);
      });
      continue;
    }
    const Row<kDType> row(a.logits, b, l, d);
    const AnyRow target(a.target, b, 0, d);
    const int64_t token = kKind == kCrossEntropy ? a.tokens[b * a.D + d] : 0;
    const float scale = token >= 0 && token < a.S ? w * a.grad_loss[b * a.L + l] : NAN;
    const Norm norm = Norm::kept(a.stats, rows, i), target_norm = Norm::kept(a.stats + 2 * rows, rows, i);
    const float scalar = a.stats[4 * rows + i];
    sweep(grad.head(a.S), a.S, group.rank, group.size, [&](int64_t s, auto width) {
      constexpr int kN = decltype(width)::value;
      float x[kN], y[kN] = {};
      row.load(s, x);
      if (kKind != kCrossEntropy) target.load(s, y);
#pragma unroll
      for (int j = 0; j < kN; ++j)
        x[j] = scale * class_gradient<kKind>(norm.log_prob(x[j]), target_norm.log_prob(y[j]), scalar);
      grad.store(s, x);
    });
    if (kKind == kCrossEntropy) {
      group.sync();  // the sweep has written the token's class
      if (group.rank == 0 && token >= 0 && token < a.S)
        grad.set(token, scale * (exp_nonpos(norm.log_prob(row[token])) - 1.0f));
    }
  }
}

}  // namespace di4c::cuda
