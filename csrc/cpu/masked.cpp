// The row losses: forward and reverse KL, Jensen-Shannon, total variation, cross entropy, and their gradients.
// A row is read for its normaliser, then, still in cache, for its terms (divergence.h). With p the student, t the
// target and delta = log p - log t, the gradient with respect to the student's logits is
//   forward KL p - t, reverse KL p (delta - KL), JS p (h - sum p h) / 2, TV p (sign - sum p sign) / 2,
//   cross entropy p - [s = token].
#include "divergence.h"
#include "kernels.h"

namespace di4c::cpu::DI4C_ISA {
namespace {

struct Scratch {
  float x[kChunk], y[kChunk];
};

// The terms of one class of a divergence.
template <RowLoss kind>
Terms terms(f32 t, f32 log_t, f32 p, f32 log_p) {
  if constexpr (kind == kForwardKl) return {kl_term(t, log_t, p, log_p), f32{}};
  if constexpr (kind == kReverseKl) return {kl_term(p, log_p, t, log_t), f32{}};
  if constexpr (kind == kJensenShannon) return js_terms(t, log_t, p, log_p);
  if constexpr (kind == kTotalVariation) return tv_terms(t, log_t, p, log_p);
}

// Gradient of one class, for upstream g.
template <RowLoss kind>
f32 slope(f32 t, f32 log_t, f32 p, f32 log_p, f32 g, f32 scalar) {
  if constexpr (kind == kForwardKl) return g * (p - t);
  const f32 delta = log_ratio(t, log_t, p, log_p);
  if constexpr (kind == kReverseKl) return p == 0.0f ? f32{} : g * p * (delta - scalar);
  if constexpr (kind == kJensenShannon) return p == 0.0f ? f32{} : 0.5f * g * p * (js_logs(delta).h - scalar);
  if constexpr (kind == kTotalVariation) return 0.5f * g * p * (sign(delta) - scalar);
  return p;
}

// f(u, start, i, n, t, log_t, p, log_p) for the vectors of a target row and a student row: elements start + i on of the
// chunk [start, start + n).
template <typename F>
inline __attribute__((always_inline)) void each_pair(const Row& target, const Row& row, Norm y, Norm x,
                                                     Scratch& s, const F& f) {
  for (int64_t start = 0; start < row.S; start += kChunk) {
    const int n = min_int(row.S - start, kChunk);
    const float* b = read(row, start, n, s.x);
    const float* a = read(target, start, n, s.y);
    each(a, n, -kInf, DI4C_EACH(int u, int i, int count, f32 v) {
      const f32 log_t = v - y.max - y.log_sum, log_p = load(b + i, count, -kInf) - x.max - x.log_sum;
      f(u, start, i, n, exp_nonpos(log_t), log_t, exp_nonpos(log_p), log_p);
    });
  }
}

template <RowLoss kind>
void forward_row(const Row& target, const Row& row, Norm y, Norm x, Scratch& s, float& loss, float& scalar) {
  double loss_sum = 0, scalar_sum = 0;
  f32 part_loss[U] = {}, part_scalar[U] = {};
  each_pair(target, row, y, x, s,
            DI4C_EACH(int u, int64_t, int i, int n, f32 t, f32 log_t, f32 p, f32 log_p) {
    const Terms now = terms<kind>(t, log_t, p, log_p);
    part_loss[u] += now.loss;
    part_scalar[u] += now.scalar;
    if (i + W < n) return;
    loss_sum += sum_block(part_loss);  // once per chunk: floats hold a thousand terms, a double holds the rest
    scalar_sum += sum_block(part_scalar);
    for (int v = 0; v < U; ++v) part_loss[v] = part_scalar[v] = f32{};
  });
  loss = static_cast<float>(loss_sum);
  scalar = kind == kReverseKl ? loss : static_cast<float>(scalar_sum);
}

template <RowLoss kind>
void backward_row(const RowLossBackwardArgs& args, const Row& target, const Row& row, void* grad, Norm y, Norm x,
                  Scratch& s, float upstream, float scalar) {
  const f32 g = set(upstream), c = set(scalar);
  const DType dtype = args.logits.dtype;
  const auto visit = DI4C_EACH(int, int64_t start, int i, int n, f32 t, f32 log_t, f32 p, f32 log_p) {
    float* out = write_target(grad, dtype, start, s.x);  // s.x: read up to i already
    store(out + i, n - i, slope<kind>(t, log_t, p, log_p, g, c));
    if (i + W >= n) write(grad, dtype, start, n, out);
  };
  each_pair(target, row, y, x, s, visit);
}

void cross_entropy_backward(const RowLossBackwardArgs& args, const Row& row, void* grad, Norm x, Scratch& s,
                            float upstream, int64_t token) {
  const f32 g = set(upstream);
  const DType dtype = args.logits.dtype;
  for (int64_t start = 0; start < row.S; start += kChunk) {
    const int n = min_int(row.S - start, kChunk);
    float* out = write_target(grad, dtype, start, s.x);
    each(read(row, start, n, s.x), n, -kInf, DI4C_EACH(int, int i, int count, f32 v) {
      store(out + i, count, g * exp_nonpos(v - x.max - x.log_sum));
    });
    if (token >= start && token < start + n) {
      float p[W];
      store(p, exp_nonpos(set(read_one(row, token)) - x.max - x.log_sum));
      out[token - start] = upstream * (p[0] - 1.0f);
    }
    write(grad, dtype, start, n, out);
  }
}

void forward_position(const RowLossArgs& args, int64_t b, int64_t d, Scratch& s) {
  const int64_t count = args.B * args.L * args.D;
  const bool used = weight_at(args.weight, b * args.D + d) != 0, cross = args.kind == kCrossEntropy;
  const Row target = cross ? Row{} : row_at(args.target, args.S, b, 0, d);
  const Norm y = used && !cross ? Norm(norm_of(target, s.y)) : Norm{};
  for (int64_t l = 0; l < args.L; ++l) {
    const int64_t i = (b * args.L + l) * args.D + d;
    float &loss = args.row[i], &scalar = args.stats[4 * count + i];
    loss = scalar = 0;
    keep(Norm{}, args.stats, count, i);
    keep(y, args.stats + 2 * count, count, i);
    if (!used) continue;
    const Row row = row_at(args.logits, args.S, b, l, d);
    const ExactNorm exact = norm_of(row, s.x);
    const Norm x = exact;
    keep(x, args.stats, count, i);
    const int64_t token = cross ? args.tokens[b * args.D + d] : 0;
    switch (args.kind) {
      case kForwardKl: forward_row<kForwardKl>(target, row, y, x, s, loss, scalar); break;
      case kReverseKl: forward_row<kReverseKl>(target, row, y, x, s, loss, scalar); break;
      case kJensenShannon: forward_row<kJensenShannon>(target, row, y, x, s, loss, scalar); break;
      case kTotalVariation: forward_row<kTotalVariation>(target, row, y, x, s, loss, scalar); break;
      case kCrossEntropy:
        loss = token < 0 || token >= args.S
                   ? kNan
                   : static_cast<float>(exact.log_sum - (static_cast<double>(read_one(row, token)) - x.max));
    }
  }
}

void backward_position(const RowLossBackwardArgs& args, int64_t b, int64_t d, Scratch& s) {
  const int64_t count = args.B * args.L * args.D;
  const float weight = weight_at(args.weight, b * args.D + d);
  const bool cross = args.kind == kCrossEntropy;
  const Row target = cross ? Row{} : row_at(args.target, args.S, b, 0, d);
  for (int64_t l = 0; l < args.L; ++l) {
    const int64_t i = (b * args.L + l) * args.D + d;
    if (weight == 0) {
      zero_row(args.grad, args.logits.dtype, i, args.S);
      continue;
    }
    const Row row = row_at(args.logits, args.S, b, l, d);
    const Norm x = kept(args.stats, count, i), y = kept(args.stats + 2 * count, count, i);
    void* grad = grad_row(args.grad, args.logits.dtype, i, args.S);
    const float g = weight * args.grad_loss[b * args.L + l], scalar = args.stats[4 * count + i];
    switch (args.kind) {
      case kForwardKl: backward_row<kForwardKl>(args, target, row, grad, y, x, s, g, scalar); break;
      case kReverseKl: backward_row<kReverseKl>(args, target, row, grad, y, x, s, g, scalar); break;
      case kJensenShannon: backward_row<kJensenShannon>(args, target, row, grad, y, x, s, g, scalar); break;
      case kTotalVariation: backward_row<kTotalVariation>(args, target, row, grad, y, x, s, g, scalar); break;
      case kCrossEntropy: cross_entropy_backward(args, row, grad, x, s, g, args.tokens[b * args.D + d]); break;
    }
  }
}

// Positions that one task takes: enough to be worth waking a thread for.
int64_t grain_of(int64_t L, int64_t S) { return 1 + (1 << 13) / (L * S + 1); }

}  // namespace

void row_loss(const RowLossArgs& args, int threads) {
  if (args.L <= 0) return;
  const int64_t total = args.B * args.D, grain = grain_of(args.L, args.S);
  parallel(ceil_div(total, grain), threads, total * args.L * args.S, sizeof(Scratch), [&](int64_t task, void* scratch) {
    const int64_t end = (task + 1) * grain < total ? (task + 1) * grain : total;
    for (int64_t i = task * grain; i < end; ++i)
      forward_position(args, i / args.D, i % args.D, *static_cast<Scratch*>(scratch));
  });
  for (int64_t i = 0; i < args.B * args.L; ++i) {
    const float* weight = args.weight ? args.weight + i / args.L * args.D : nullptr;
    args.loss[i] = weighted_sum(args.row + i * args.D, weight, args.D);
  }
}

void row_loss_backward(const RowLossBackwardArgs& args, int threads) {
  if (args.L <= 0) return;
  const int64_t total = args.B * args.D, grain = grain_of(args.L, args.S);
  parallel(ceil_div(total, grain), threads, total * args.L * args.S, sizeof(Scratch), [&](int64_t task, void* scratch) {
    const int64_t end = (task + 1) * grain < total ? (task + 1) * grain : total;
    for (int64_t i = task * grain; i < end; ++i)
      backward_position(args, i / args.D, i % args.D, *static_cast<Scratch*>(scratch));
  });
}

}  // namespace di4c::cpu::DI4C_ISA
