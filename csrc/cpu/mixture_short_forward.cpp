// mixture_positions where rows are short: see mixture_forward.cpp for what is computed, mixture_short.h for how.
#include "kernels.h"
#include "mixture_short_kernels.h"

namespace di4c::cpu::DI4C_ISA {
namespace {

struct ShortForward {
  const MixtureArgs& args;
  Arena arena;
  const int64_t S, L, K;
  ShortRows logits, teacher, target;
  KeptLines lines;  // of the block's positions
  Lines rows;
  double *total, *marginal;  // (K, wide), (K): sums over the block's positions
  double* centred;           // (S, wide): w (log p - log mean p), 0 where no row has the state
  float *pull, *share, *spread;  // (2, wide), (padded S) each

  ShortForward(const MixtureArgs& x, void* memory)
      : args(x), arena(memory), S(x.S), L(x.L), K(x.K), logits(arena, L, S, true),
        teacher(arena, x.teacher.data ? 1 : 0, S, false),
        target(arena, x.T, S, false), lines(arena, x), rows(arena, kParts),
        total(arena.take<double>(K * logits.wide)), marginal(arena.take<double>(K)),
        centred(arena.take<double>(K > 0 ? S * logits.wide : 0)),
        pull(arena.take<float>(2 * logits.wide)), share(arena.take<float>(padded(S))),
        spread(arena.take<float>(padded(S))) {}

  void block(int64_t task, int64_t blocks) {
    const int64_t b = task / blocks, first = task % blocks * kPositions;
    const int64_t end = first + kPositions < args.D ? first + kPositions : args.D;
    for (int64_t i = 0; i < K * logits.wide; ++i) total[i] = 0;
    for (int64_t k = 0; k < K; ++k) marginal[k] = 0;
    for (int64_t d = first; d < end; ++d) position(b, d, d - first, weight_at(args.weight, b * args.D + d));
    lines.write(args, b, first, end - first);
    rows.write(args.row, 1, args.B, args.D, b, first, end - first);
    double* work = args.work + task * (L + 1) * K;
    for (int64_t l = 0; l < L; ++l)
      for (int64_t k = 0; k < K; ++k) work[l * K + k] = total[k * logits.wide + l];
    for (int64_t k = 0; k < K; ++k) work[L * K + k] = marginal[k];
  }

  void position(int64_t b, int64_t d, int64_t at, double w) {
    const bool inside = is_inside(args.inside, b), aims = args.T > 0 && !inside;
    const bool distils = args.teacher.data && (inside || !args.inside);
    double part[kParts] = {};
    for (int64_t i = 0; i < 2 * logits.wide; ++i) pull[i] = 0;
    const auto prepare = [&](ShortRows& rows, const Logits& x, bool used) {
      for (int64_t i = 0; i < rows.count && !used; ++i) rows.max[i] = rows.log_sum[i] = 0;
      if (!used) return;
      rows.read_rows(x, b, d);
      rows.normalise();
    };
    if (w != 0 && d + 1 < args.D)
      for (int64_t l = 0; l < L; ++l) prefetch(args.logits, S, b, l, d + 1);
    prepare(logits, args.logits, w != 0);
    prepare(teacher, args.teacher, w != 0 && args.teacher.data);
    prepare(target, args.target, w != 0 && aims);
    if (w != 0) {
      if (K > 0 || args.teacher.data || args.information)
        logits.shares();
      else
        logits.rough_shares();
      if (K > 0) add_tokens(b, d, w);
      if (args.teacher.data) {
        teacher.rough_shares();
        part[kMarginalTeacher] = divergence(teacher.log_mean, pull);
      }
      if (distils) part[kDistillation] = distillation();
      if (aims) {
        target.rough_shares();
        part[kMarginalTarget] = divergence(target.log_mean, pull + (args.teacher.data ? logits.wide : 0));
      }
      if (args.information) {
        for (int64_t s = 0; s < padded(S); ++s)
          spread[s] = s < S ? static_cast<float>(logits.log_p[s * logits.wide]) : -kInf;
        part[kInformation] = divergence(spread, nullptr);
      }
    }
    logits.keep_all(lines.lse, at);
    teacher.keep_all(lines.lse_teacher, at);
    target.keep_all(lines.lse_target, at);
    for (int64_t q = 0; q < kParts; ++q) rows.at(q, at) = static_cast<float>(part[q]);
    for (int64_t i = 0; i < lines.pulls.count; ++i) lines.pulls.at(i, at) = pull[i / L * logits.wide + i % L];
  }

  // A state's line is the same for every token that names it.
  void add_tokens(int64_t b, int64_t d, double w) {
    const double none = -static_cast<double>(kInf);
    for (int64_t s = 0; s < S; ++s) {
      const double lme = logits.exact_mean[s];
      const double* from = logits.log_p + s * logits.wide;
      double* to = centred + s * logits.wide;
      for (int64_t l = 0; l < logits.wide; l += W / 2) store(to + l, lme == none ? f64{} : w * (load(from + l) - lme));
    }
    for (int64_t k = 0; k < K; ++k) {
      const int64_t token = token_of(args, b, k, d);
      double* to = total + k * logits.wide;
      if (token < 0 || token >= S) {
        marginal[k] = to[0] = __builtin_nan("");
        continue;
      }
      const double* from = centred + token * logits.wide;
      marginal[k] += w * logits.exact_mean[token];
      for (int64_t l = 0; l < logits.wide; l += W / 2) store(to + l, load(to + l) + load(from + l));
    }
  }

  // KL to the mixture's marginal from a law given by its logs (padded S); adds the pulls to `to` unless null.
  double divergence(const float* log_t, float* to) {
    f32 kl[U] = {};
    for (int64_t s = 0; s < padded(S); s += W) {
      const f32 lt = load(log_t + s), lp = load(logits.log_mean + s), t = exp_nonpos(lt), mass = load(logits.sum + s);
      kl[s / W % U] += kl_term(t, lt, exp_nonpos(lp), lp);
      store(share + s, mass == 0.0f ? f32{} : t / mass);
    }
    for (int64_t l = 0; l < logits.wide && to; l += W) {
      f32 now = load(to + l);
      for (int64_t s = 0; s < S; ++s) now = fma(set(share[s]), load(logits.e + s * logits.wide + l), now);
      store(to + l, now);
    }
    return sum_block(kl);
  }

  // mean_l KL(teacher || p_l) = sum_s t (log t - mean_l log p_l) + mean_l p_l - t
  double distillation() {
    for (int64_t s = 0; s < padded(S); ++s) spread[s] = -kInf;
    for (int64_t s = 0; s < S; ++s) {
      double sum = 0;
      for (int64_t l = 0; l < L; ++l) sum += logits.log_p[s * logits.wide + l];
      spread[s] = static_cast<float>(sum / static_cast<double>(L));
    }
    f32 now[U] = {};
    for (int64_t s = 0; s < padded(S); s += W) {
      const f32 lt = load(teacher.log_mean + s), mean = load(spread + s), t = exp_nonpos(lt);
      const f32 term = (mean == -kInf) & (lt > -kInf) ? set(kInf) : t == 0.0f ? f32{} : t * (lt - mean);
      now[s / W % U] += term + (exp_nonpos(load(logits.log_mean + s)) - t);
    }
    return sum_block(now);
  }
};

}  // namespace

void short_positions(const MixtureArgs& args, int threads) {
  const int64_t blocks = ceil_div(args.D, kPositions);
  const int64_t elements = args.B * args.D * ((args.L + args.T) * args.S * 4 + args.L * args.K);
  parallel(args.B * blocks, threads, elements, ShortForward(args, nullptr).arena.used(),
           [&](int64_t task, void* memory) { ShortForward(args, memory).block(task, blocks); });
}

}  // namespace di4c::cpu::DI4C_ISA
