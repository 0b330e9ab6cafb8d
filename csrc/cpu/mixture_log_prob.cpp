// Joint log-probability of K sequences under a mixture of L products, its correlation part, and their gradient.
//   a_ldk = log p_l^d(x_k^d),  c_lk = sum_d w_d (a_ldk - LME_l a_ldk),  correlation_k = LME_l c_lk,
//   joint_k = correlation_k + sum_d w_d LME_l a_ldk: the small number is never the difference of two big ones.
// A position where every component gives 0 to the token counts as 0 in c, and makes joint -inf.
// Gradient, with share = softmax_l c and rho_ldk = softmax_l a_ldk:
//   dlogits_lds = sum_k coefficient_lk ([s = x_k^d] - p_l^d(s)),
//   coefficient_lk = w_d ((gj_k + gc_k) share_lk - gc_k rho_ldk), 0 at a position that counts as 0.
#include "kernels.h"
#include "rows.h"

namespace di4c::cpu::DI4C_ISA {
namespace {

// Per thread: tables over (l, k), K padded to whole vectors so that loops over k need no tail.
struct Tables {
  int64_t Kp;
  double *a, *top, *lme;     // (L, Kp), (Kp), (Kp)
  float *e, *sum, *by_token; // (L, Kp), (Kp), (Kp)
  int64_t *token, *first;    // (Kp): x_k^d, 0 for one that is no class; the first k with the same token
  double* outside;           // (Kp): NaN for a token that is no class, else 0
  float* buffer;             // kChunk

  static int64_t padded(int64_t K) { return ceil_div(K, W) * W; }
  static size_t bytes(int64_t L, int64_t K) {
    const int64_t Kp = padded(K);
    return static_cast<size_t>((L + 5) * Kp * 8 + (L + 2) * Kp * 4 + kChunk * 4 + 64);
  }
  Tables(void* memory, int64_t L, int64_t K) : Kp(padded(K)) {
    a = static_cast<double*>(memory);
    top = a + L * Kp;
    lme = top + Kp;
    outside = lme + Kp;
    token = reinterpret_cast<int64_t*>(outside + Kp);
    first = token + Kp;
    e = reinterpret_cast<float*>(first + Kp);
    sum = e + L * Kp;
    by_token = sum + Kp;
    buffer = by_token + Kp;
  }
};

// The K tokens at position d, which lie D apart in memory: read once for all L rows.
template <typename Args>
void load_tokens(const Args& args, const Tables& t, int64_t b, int64_t d) {
  for (int64_t k = 0; k < args.K; ++k) {
    const int64_t token = args.tokens[(b * args.K + k) * args.D + d];
    const bool valid = token >= 0 && token < args.S;
    t.token[k] = valid ? token : 0;
    t.outside[k] = valid ? 0 : __builtin_nan("");
  }
  for (int64_t k = args.K; k < t.Kp; ++k) t.token[k] = 0, t.outside[k] = 0;
}

// a_lk of one row for the K tokens; NaN for a token that is no class.
void gather(const Tables& t, int64_t l, const Row& row, ExactNorm norm) {
  double* a = t.a + l * t.Kp;
  const auto take = [&](auto at) {
    for (int64_t k = 0; k < t.Kp; ++k)
      a[k] = (static_cast<double>(at(t.token[k])) - norm.max) - norm.log_sum + t.outside[k];
  };
  if (row.dtype == kFloat32)
    take([x = static_cast<const float*>(row.data)](int64_t token) { return x[token]; });
  else
    take([&row](int64_t token) { return read_one(row, token); });
}

// From a: top_k = max_l a, e_lk = exp(a - top), sum_k; NaN in any component of k makes e and sum NaN.
void normalise(const Tables& t, int64_t L) {
  const int64_t Kp = t.Kp;
  for (int64_t k = 0; k < Kp; ++k) t.top[k] = t.a[k], t.sum[k] = 0;
  for (int64_t l = 1; l < L; ++l)
    for (int64_t k = 0; k < Kp; ++k) {
      const double a = t.a[l * Kp + k];
      t.top[k] = a > t.top[k] || a != a ? a : t.top[k];
    }
  for (int64_t l = 0; l < L; ++l) {
    float* e = t.e + l * Kp;
    for (int64_t k = 0; k < Kp; ++k) e[k] = static_cast<float>(t.a[l * Kp + k] - t.top[k]);
    for (int64_t k = 0; k < Kp; k += W) {
      const f32 v = exp_nonpos(load(e + k));
      store(e + k, v);
      store(t.sum + k, load(t.sum + k) + v);
    }
  }
}

// One block of positions: its part of c and of sum_d w LME.
void forward_block(const MixtureLogProbArgs& args, int64_t b, int64_t block, double* part, const Tables& t) {
  const int64_t end = (block + 1) * kPositions < args.D ? (block + 1) * kPositions : args.D;
  for (int64_t i = 0; i < (args.L + 1) * args.K; ++i) part[i] = 0;
  for (int64_t d = block * kPositions; d < end; ++d) {
    const double w = weight_at(args.weight, b * args.D + d);
    if (w != 0) load_tokens(args, t, b, d);
    for (int64_t l = 0; l < args.L; ++l) {
      const Row row = row_at(args.logits, b, l, d);
      const ExactNorm norm = w == 0 ? ExactNorm{} : norm_of(row, args.S, t.buffer);
      keep(norm, args.lse, args.B * args.L * args.D, (b * args.L + l) * args.D + d);
      if (w != 0) gather(t, l, row, norm);
    }
    if (w == 0) continue;
    normalise(t, args.L);
    const double log_count = ::log(static_cast<double>(args.L));
    for (int64_t k = 0; k < args.K; ++k) {
      const bool dead = t.top[k] == -static_cast<double>(kInf);
      t.lme[k] = dead ? t.top[k] : t.top[k] + ::log(static_cast<double>(t.sum[k])) - log_count;
      part[args.L * args.K + k] += w * t.lme[k];
    }
    for (int64_t l = 0; l < args.L; ++l)
      for (int64_t k = 0; k < args.K; ++k)
        part[l * args.K + k] += t.lme[k] == -static_cast<double>(kInf) ? 0 : w * (t.a[l * t.Kp + k] - t.lme[k]);
  }
}

// The blocks of (b, k) in order, then the mean over l.
void finish(const MixtureLogProbArgs& args, int64_t b, int64_t k, int64_t blocks) {
  const auto total = [&](int64_t l) {
    double sum = 0;
    for (int64_t i = 0; i < blocks; ++i) sum += args.work[((b * blocks + i) * (args.L + 1) + l) * args.K + k];
    return sum;
  };
  double top = total(0), sum = 0;
  for (int64_t l = 1; l < args.L; ++l) {
    const double c = total(l);
    top = c > top || c != c ? c : top;
  }
  const double shift = top == -static_cast<double>(kInf) ? 0 : top;
  for (int64_t l = 0; l < args.L; ++l) sum += ::exp(total(l) - shift);
  const double correlation = shift + ::log(sum) - ::log(static_cast<double>(args.L));
  for (int64_t l = 0; l < args.L; ++l)
    args.share[(b * args.L + l) * args.K + k] = sum == 0 ? 0.0f : static_cast<float>(::exp(total(l) - shift) / sum);
  args.correlation[b * args.K + k] = static_cast<float>(correlation);
  args.joint[b * args.K + k] = static_cast<float>(correlation + total(args.L));
}

Norm norm_at(const MixtureLogProbBackwardArgs& args, int64_t b, int64_t l, int64_t d) {
  return kept(args.lse, args.B * args.L * args.D, (b * args.L + l) * args.D + d);
}

// grad row = -total p + the coefficients at their tokens, each element rounded once.
void backward_row(const MixtureLogProbBackwardArgs& args, const Tables& t, int64_t b, int64_t l, int64_t d) {
  const Row row = row_at(args.logits, b, l, d);
  const Norm norm = norm_at(args, b, l, d);
  const DType dtype = args.logits.dtype;
  void* grad = grad_row(args.grad, dtype, (b * args.L + l) * args.D + d, args.S);
  const float* coefficient = t.e + l * t.Kp;
  float total = 0;
  for (int64_t k = 0; k < args.K; ++k) total += coefficient[k], t.by_token[k] = 0;
  const f32 m = set(norm.max), s = set(norm.log_sum), minus = set(-total);
  for (int64_t start = 0; start < args.S; start += kChunk) {
    const int n = min_int(args.S - start, kChunk);
    float* out = write_target(grad, dtype, start, t.buffer);
    each(read(row, start, n, t.buffer), n, -kInf, DI4C_EACH(int, int i, int count, f32 x) {
      store(out + i, count, minus * exp_nonpos(x - m - s));
    });
    write(grad, dtype, start, n, out);
  }
  for (int64_t k = 0; k < args.K; ++k) t.by_token[t.first[k]] += coefficient[k];
  const double* a = t.a + l * t.Kp;
  for (int64_t k = 0; k < t.Kp; ++k) t.sum[k] = static_cast<float>(a[k]);
  for (int64_t k = 0; k < t.Kp; k += W) store(t.sum + k, fma(minus, exp_nonpos(load(t.sum + k)), load(t.by_token + k)));
  uint16_t* halves = reinterpret_cast<uint16_t*>(t.by_token);
  write(halves, dtype, 0, static_cast<int>(args.K), t.sum);
  for (int64_t k = 0; k < args.K; ++k) {
    const int64_t token = t.token[k];
    if (t.first[k] != k || t.outside[k] != 0) continue;
    if (dtype == kFloat32)
      static_cast<float*>(grad)[token] = t.sum[k];
    else
      static_cast<uint16_t*>(grad)[token] = halves[k];
  }
}

void backward_position(const MixtureLogProbBackwardArgs& args, const Tables& t, int64_t b, int64_t d) {
  const float w = weight_at(args.weight, b * args.D + d);
  if (w == 0) {
    for (int64_t l = 0; l < args.L; ++l) zero_row(args.grad, args.logits.dtype, (b * args.L + l) * args.D + d, args.S);
    return;
  }
  load_tokens(args, t, b, d);
  for (int64_t l = 0; l < args.L; ++l) {
    const Norm norm = norm_at(args, b, l, d);
    gather(t, l, row_at(args.logits, b, l, d), {norm.max, norm.log_sum});
  }
  normalise(t, args.L);
  for (int64_t k = 0; k < args.K; ++k) {
    t.first[k] = k;
    for (int64_t j = 0; j < k; ++j)
      if (t.token[j] == t.token[k] && t.outside[j] == t.outside[k]) {
        t.first[k] = j;
        break;
      }
  }
  for (int64_t l = 0; l < args.L; ++l)
    for (int64_t k = 0; k < args.K; ++k) {
      const float gj = args.grad_joint[b * args.K + k], gc = args.grad_correlation[b * args.K + k];
      const float share = args.share[(b * args.L + l) * args.K + k], rho = t.e[l * t.Kp + k] / t.sum[k];
      const bool dead = t.top[k] == -static_cast<double>(kInf);
      t.e[l * t.Kp + k] = dead ? 0.0f : w * ((gj + gc) * share - gc * rho);
    }
  for (int64_t l = 0; l < args.L; ++l) backward_row(args, t, b, l, d);
}

}  // namespace

void mixture_log_prob(const MixtureLogProbArgs& args, int threads) {
  const int64_t blocks = ceil_div(args.D, kPositions), elements = args.B * args.L * args.D * (args.S + args.K);
  if (args.L <= 0) return;
  parallel(args.B * blocks, threads, elements, Tables::bytes(args.L, args.K), [&](int64_t task, void* scratch) {
    forward_block(args, task / blocks, task % blocks, args.work + task * (args.L + 1) * args.K,
                  Tables(scratch, args.L, args.K));
  });
  parallel(args.B, threads, args.B * args.K * args.L * (blocks + 16), 0, [&](int64_t b, void*) {
    for (int64_t k = 0; k < args.K; ++k) finish(args, b, k, blocks);
  });
}

void mixture_log_prob_backward(const MixtureLogProbBackwardArgs& args, int threads) {
  if (args.L <= 0 || args.S <= 0) return;
  const int64_t elements = args.B * args.L * args.D * (args.S + args.K);
  parallel(args.B * args.D, threads, elements, Tables::bytes(args.L, args.K), [&](int64_t task, void* scratch) {
    backward_position(args, Tables(scratch, args.L, args.K), task / args.D, task % args.D);
  });
}

}  // namespace di4c::cpu::DI4C_ISA
