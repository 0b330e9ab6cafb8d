// mixture_backward where rows are short: see mixture_backward.cpp for what is computed, mixture_short.h for how. With
// r_ls = p_l / sum_l' p_l', and sums over the tokens that name the state s:
//   dlogits_ls = p_l A_l + w sum_k (gj + gc)_k share_lk - (w sum_k gc_k + w G_mt t + w G_mg g) r_ls - w G_dist / L t
#include "kernels.h"
#include "mixture_short_kernels.h"

namespace di4c::cpu::DI4C_ISA {
namespace {

struct ShortBackward {
  const MixtureBackwardArgs& args;
  Arena arena;
  const int64_t S, L, K;
  ShortRows logits, teacher, target;
  KeptLines lines;  // of a few positions
  float* brought;   // (K, wide): (gj + gc)_k share_lk of the sample `sample`
  float* by_state;  // (S, wide): their sums over the tokens of this position that name a state
  float *slope, *over, *same, *named;  // (wide), (S): A_l; what multiplies r; what is taken off; sum_k gc_k
  float* piece;     // (kShort)
  int64_t sample = -1;

  ShortBackward(const MixtureBackwardArgs& x, void* memory)
      : args(x), arena(memory), S(x.S), L(x.L), K(x.K), logits(arena, L, S, true),
        teacher(arena, x.teacher.data ? 1 : 0, S, false), target(arena, x.T, S, false), lines(arena, x),
        brought(arena.take<float>(K * logits.wide)),
        by_state(arena.take<float>(S * logits.wide)), slope(arena.take<float>(logits.wide)),
        over(arena.take<float>(S)), same(arena.take<float>(S)), named(arena.take<float>(S)),
        piece(arena.take<float>(padded(kShort))) {}

  int64_t row_of(int64_t b, int64_t l, int64_t d) const { return (b * L + l) * args.D + d; }

  void position(int64_t b, int64_t d, int64_t at) {
    const float w = weight_at(args.weight, b * args.D + d);
    const DType dtype = args.logits.dtype;
    if (w == 0) {
      for (int64_t l = 0; l < L; ++l) zero_row(args.grad, dtype, row_of(b, l, d), S);
      return;
    }
    const PartGradients parts(args, b, w);
    if (d + 1 < args.D)
      for (int64_t l = 0; l < L; ++l) prefetch(args.logits, S, b, l, d + 1);
    logits.read_rows(args.logits, b, d);
    logits.recall(lines.lse, at);
    logits.rough_shares();
    for (int64_t l = 0; l < logits.wide; ++l) slope[l] = l < L ? parts.slope(lines.pulls, L, l, at) : 0;
    for (int64_t s = 0; s < S; ++s) over[s] = same[s] = 0;
    const auto weigh = [&](ShortRows& rows, const Logits& x, const Lines& planes, float by, float taken) {
      if (by == 0 && taken == 0) return;
      rows.read_rows(x, b, d);
      rows.recall(planes, at);
      rows.rough_shares();
      for (int64_t s = 0; s < S; s += W) {
        const int n = min_int(S - s, W);
        const f32 t = exp_nonpos(load(rows.log_mean + s));
        store(over + s, n, fma(set(by), t, load(over + s, n, 0.0f)));
        store(same + s, n, fma(set(taken), t, load(same + s, n, 0.0f)));
      }
    };
    weigh(teacher, args.teacher, lines.lse_teacher, parts.to_teacher, parts.distillation);
    weigh(target, args.target, lines.lse_target, parts.to_target, 0.0f);
    if (K > 0) add_tokens(b, d, w);
    write_rows(b, d);
  }

  // gc, 0 where the value is -inf: it has no gradient then.
  float own(int64_t b, int64_t k) const {
    return args.correlation[b * K + k] == -kInf ? 0.0f : args.grad_correlation[b * K + k];
  }

  // The sample's (gj + gc) share, a line of lanes to each k: made once for all its positions.
  void bring(int64_t b) {
    if (sample == b) return;
    sample = b;
    for (int64_t k = 0; k < K; ++k) {
      const float both = args.joint[b * K + k] == -kInf ? own(b, k) : args.grad_joint[b * K + k] + own(b, k);
      for (int64_t l = 0; l < logits.wide; ++l)
        brought[k * logits.wide + l] = l < L ? both * args.share[(b * L + l) * K + k] : 0;
    }
  }

  void add_tokens(int64_t b, int64_t d, float w) {
    bring(b);
    const int64_t wide = logits.wide;
    for (int64_t i = 0; i < S * wide; ++i) by_state[i] = 0;
    for (int64_t s = 0; s < S; ++s) named[s] = 0;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t token = token_of(args, b, k, d);
      const bool outside = token < 0 || token >= S;  // such a sample is NaN already
      if (!outside && logits.sum[token] == 0) continue;
      float* to = by_state + (outside ? 0 : token) * wide;
      named[outside ? 0 : token] += own(b, k);
      for (int64_t l = 0; l < wide; l += W) store(to + l, load(to + l) + load(brought + k * wide + l));
    }
    for (int64_t s = 0; s < S; ++s) {
      const float inverse = logits.sum[s] == 0 ? 0 : 1.0f / logits.sum[s];
      named[s] *= w;
      const f32 taken = set(named[s] * inverse), by = set(w);
      for (int64_t l = 0; l < wide; l += W) {
        const f32 here = by * load(by_state + s * wide + l);
        store(by_state + s * wide + l, here);
        store(slope + l, load(slope + l) - (here - taken * load(logits.e + s * wide + l)));
      }
      over[s] += named[s];
    }
  }

  void write_rows(int64_t b, int64_t d) {
    const int64_t wide = logits.wide;
    for (int64_t s = 0; s < S; ++s) {
      const bool none = logits.sum[s] == 0;
      const f32 p_top = set(none ? 0 : exp_nonpos(set(static_cast<float>(logits.top[s])))[0]);
      const f32 taken = set(none ? 0 : over[s] / logits.sum[s]), off = set(same[s]);
      for (int64_t l = 0; l < wide; l += W) {
        const f32 e = load(logits.e + s * wide + l);
        f32 v = e * (p_top * load(slope + l) - taken) - off;
        if (K > 0) v += load(by_state + s * wide + l);
        store(logits.x + s * wide + l, v);
      }
    }
    const DType dtype = args.logits.dtype;
    for (int64_t l = 0; l < L; ++l) {
      void* grad = grad_row(args.grad, dtype, row_of(b, l, d), S);
      float* out = write_target(grad, dtype, 0, piece);
      for (int64_t s = 0; s < S; ++s) out[s] = logits.x[s * wide + l];
      write(grad, dtype, 0, static_cast<int>(S), out);
    }
  }
};

}  // namespace

void short_backward(const MixtureBackwardArgs& args, int threads) {
  constexpr int64_t kRun = 1 << 16;
  const int64_t per_position = (args.L + args.T) * args.S * 4 + args.L * args.K + 1;
  const int64_t fitting = kRun / per_position, length = fitting < 1 ? 1 : fitting < kPositions ? fitting : kPositions;
  const Runs runs(args.B * args.D, length, threads);
  parallel(runs.tasks, threads, args.B * args.D * per_position, ShortBackward(args, nullptr).arena.used(),
           [&](int64_t task, void* memory) {
    ShortBackward backward(args, memory);
    const int64_t first = runs.first(task);
    backward.lines.each_run(args, first, runs.end(first), [&](int64_t b, int64_t d, int64_t n) {
      for (int64_t at = 0; at < n; ++at) backward.position(b, d + at, at);
    });
  });
}

}  // namespace di4c::cpu::DI4C_ISA
