// KL from a target, itself a mixture of T >= 1, to the mean of L components, per position, and its gradient.
// All L rows are walked together in strips of kColumns: per class s, with a_ls = log p_l(s),
//   top = max_l a, e_ls = exp(a_ls - top), log mean = top + log(sum_l e) - log L
// so components that lie far apart lose nothing. Gradient, with r_ls = e_ls / sum_l e and pull_l = sum_s t_s r_ls:
//   dlogits_ls = w g (p_l(s) pull_l - t_s r_ls) = w g e_ls (exp(top) pull_l - t_s / sum_l e).
#include "divergence.h"
#include "kernels.h"
#include "rows.h"

namespace di4c::cpu::DI4C_ISA {
namespace {

constexpr int kColumns = 128;

// Rows 0..count of one position, their normalisers, and a strip of them.
struct Mixture {
  Norm* norm;  // (count)
  float* e;    // (count, kColumns)
  float top[kColumns], sum[kColumns];
};

struct Scratch {
  Mixture target, logits;
  float log_t[kColumns], t[kColumns];
  float buffer[kChunk];

  static int64_t rows(int64_t T, int64_t L) { return T > L ? T : L; }
  static size_t bytes(int64_t T, int64_t L) {
    const size_t pull = sizeof(double) * L, e = sizeof(float) * rows(T, L) * kColumns, norms = sizeof(Norm) * (T + L);
    return sizeof(Scratch) + pull + e + norms;
  }
  // Lays the tables out behind the struct; the strips of target and logits take turns in one.
  static Scratch& at(void* memory, int64_t T, int64_t L, double*& pull) {
    Scratch& s = *static_cast<Scratch*>(memory);
    pull = reinterpret_cast<double*>(&s + 1);
    s.target.e = s.logits.e = reinterpret_cast<float*>(pull + L);
    s.target.norm = reinterpret_cast<Norm*>(s.logits.e + rows(T, L) * kColumns);
    s.logits.norm = s.target.norm + T;
    return s;
  }
};

// e, top and sum of the strip [start, start + n); lanes past n hold 0 in e and sum.
void strip(Mixture& mix, const Logits& x, int64_t count, int64_t b, int64_t d, int64_t start, int n, float* buffer) {
  for (int j = 0; j < n; j += W) store(mix.top + j, set(-kInf));
  for (int64_t l = 0; l < count; ++l) {
    const f32 m = set(mix.norm[l].max), s = set(mix.norm[l].log_sum);
    float* a = mix.e + l * kColumns;
    each(read(row_at(x, b, l, d), start, n, buffer), n, -kInf, DI4C_EACH(int, int j, int, f32 v) {
      v = v - m - s;
      store(a + j, v);
      store(mix.top + j, max(v, load(mix.top + j)));
    });
  }
  for (int j = 0; j < n; j += W) {
    const f32 top = load(mix.top + j), shift = top == -kInf ? f32{} : top;
    f32 sum = {};
    for (int64_t l = 0; l < count; ++l) {
      float* a = mix.e + l * kColumns + j;
      const f32 e = exp_nonpos(load(a) - shift);
      store(a, e);
      sum += e;
    }
    store(mix.sum + j, sum);
  }
}

f32 log_mean(const Mixture& mix, int j, float log_count) {
  const f32 sum = load(mix.sum + j);
  return sum == 0.0f ? set(-kInf) : load(mix.top + j) + (log_normal(sum) - log_count);
}

// The target's strip: its probabilities and their logs.
void target_strip(Scratch& s, const Logits& x, int64_t T, int64_t b, int64_t d, int64_t start, int n) {
  if (T == 1) {
    const f32 m = set(s.target.norm[0].max), shift = set(s.target.norm[0].log_sum);
    each(read(row_at(x, b, 0, d), start, n, s.buffer), n, -kInf, DI4C_EACH(int, int j, int, f32 v) {
      v = v - m - shift;
      store(s.log_t + j, v);
      store(s.t + j, exp_nonpos(v));
    });
    return;
  }
  strip(s.target, x, T, b, d, start, n, s.buffer);
  const float log_count = static_cast<float>(::log(static_cast<double>(T)));
  for (int j = 0; j < n; j += W) {
    const f32 v = log_mean(s.target, j, log_count);
    store(s.log_t + j, v);
    store(s.t + j, exp_nonpos(v));
  }
}

void forward_position(const MixtureKlArgs& args, int64_t b, int64_t d, Scratch& s, double* pull) {
  const auto normalise = [&](const Logits& x, int64_t count, float* lse, Mixture& mix) {
    for (int64_t l = 0; l < count; ++l) {
      mix.norm[l] = norm_of(row_at(x, b, l, d), args.S, s.buffer);
      keep(mix.norm[l], lse, args.B * count * args.D, (b * count + l) * args.D + d);
    }
  };
  normalise(args.target, args.T, args.lse_target, s.target);
  normalise(args.logits, args.L, args.lse, s.logits);
  for (int64_t l = 0; l < args.L; ++l) pull[l] = 0;
  const float log_count = static_cast<float>(::log(static_cast<double>(args.L)));
  double kl = 0;
  for (int64_t start = 0; start < args.S; start += kColumns) {
    const int n = min_int(args.S - start, kColumns);
    target_strip(s, args.target, args.T, b, d, start, n);
    strip(s.logits, args.logits, args.L, b, d, start, n, s.buffer);
    f32 sum[U] = {};
    for (int j = 0; j < n; j += W) {
      const f32 log_p = log_mean(s.logits, j, log_count), t = load(s.t + j), mass = load(s.logits.sum + j);
      sum[j / W % U] += kl_term(t, load(s.log_t + j), exp_nonpos(log_p), log_p);
      store(s.t + j, mass == 0.0f ? f32{} : t / mass);
    }
    kl += sum_block(sum);
    for (int64_t l = 0; l < args.L; ++l) {
      const float* e = s.logits.e + l * kColumns;
      f32 part[U] = {};
      for (int j = 0; j < n; j += W) part[j / W % U] = fma(load(s.t + j), load(e + j), part[j / W % U]);
      pull[l] += sum_block(part);
    }
  }
  for (int64_t l = 0; l < args.L; ++l) args.pull[(b * args.L + l) * args.D + d] = static_cast<float>(pull[l]);
  args.row[b * args.D + d] = static_cast<float>(kl);
}

void backward_position(const MixtureKlBackwardArgs& args, int64_t b, int64_t d, Scratch& s) {
  const DType dtype = args.logits.dtype;
  const float weight = weight_at(args.weight, b * args.D + d);
  const auto row_of = [&](int64_t l) { return (b * args.L + l) * args.D + d; };
  if (weight == 0) {
    for (int64_t l = 0; l < args.L; ++l) zero_row(args.grad, dtype, row_of(l), args.S);
    return;
  }
  const auto recall = [&](int64_t count, const float* lse, Mixture& mix) {
    for (int64_t l = 0; l < count; ++l)
      mix.norm[l] = kept(lse, args.B * count * args.D, (b * count + l) * args.D + d);
  };
  recall(args.T, args.lse_target, s.target);
  recall(args.L, args.lse, s.logits);
  const f32 g = set(weight * args.grad_kl[b]);
  for (int64_t start = 0; start < args.S; start += kColumns) {
    const int n = min_int(args.S - start, kColumns);
    target_strip(s, args.target, args.T, b, d, start, n);
    strip(s.logits, args.logits, args.L, b, d, start, n, s.buffer);
    for (int j = 0; j < n; j += W) {
      const f32 mass = load(s.logits.sum + j), scale = exp_nonpos(load(s.logits.top + j));
      store(s.t + j, mass == 0.0f ? f32{} : g * load(s.t + j) / mass);
      store(s.logits.top + j, g * scale);
    }
    for (int64_t l = 0; l < args.L; ++l) {
      void* grad = grad_row(args.grad, dtype, row_of(l), args.S);
      float* out = write_target(grad, dtype, start, s.buffer);
      const f32 pull = set(args.pull[row_of(l)]);
      for (int j = 0; j < n; j += W) {
        const f32 e = load(s.logits.e + l * kColumns + j);
        const f32 v = e * fma(load(s.logits.top + j), pull, -load(s.t + j));
        store(out + j, n - j, v);
      }
      write(grad, dtype, start, n, out);
    }
  }
}

// Positions that one task takes: enough to be worth waking a thread for.
int64_t grain_of(int64_t rows, int64_t S) { return 1 + (1 << 13) / (rows * S + 1); }

}  // namespace

void mixture_kl(const MixtureKlArgs& args, int threads) {
  if (args.L <= 0 || args.T <= 0) return;
  const int64_t total = args.B * args.D, grain = grain_of(args.T + args.L, args.S);
  const int64_t elements = total * (args.T + args.L) * args.S;
  parallel(ceil_div(total, grain), threads, elements, Scratch::bytes(args.T, args.L), [&](int64_t task, void* memory) {
    double* pull;
    Scratch& s = Scratch::at(memory, args.T, args.L, pull);
    const int64_t end = (task + 1) * grain < total ? (task + 1) * grain : total;
    for (int64_t i = task * grain; i < end; ++i) {
      const int64_t b = i / args.D, d = i % args.D;
      if (weight_at(args.weight, i) != 0) {
        forward_position(args, b, d, s, pull);
        continue;
      }
      args.row[i] = 0;
      for (int64_t l = 0; l < args.T; ++l) keep({}, args.lse_target, total * args.T, (b * args.T + l) * args.D + d);
      for (int64_t l = 0; l < args.L; ++l) keep({}, args.lse, total * args.L, (b * args.L + l) * args.D + d);
      for (int64_t l = 0; l < args.L; ++l) args.pull[(b * args.L + l) * args.D + d] = 0;
    }
  });
  for (int64_t b = 0; b < args.B; ++b)
    args.kl[b] = weighted_sum(args.row + b * args.D, args.weight ? args.weight + b * args.D : nullptr, args.D);
}

void mixture_kl_backward(const MixtureKlBackwardArgs& args, int threads) {
  if (args.L <= 0 || args.T <= 0) return;
  const int64_t total = args.B * args.D, grain = grain_of(args.T + args.L, args.S);
  const int64_t elements = total * (args.T + 2 * args.L) * args.S;
  parallel(ceil_div(total, grain), threads, elements, Scratch::bytes(args.T, args.L), [&](int64_t task, void* memory) {
    double* pull;
    Scratch& s = Scratch::at(memory, args.T, args.L, pull);
    const int64_t end = (task + 1) * grain < total ? (task + 1) * grain : total;
    for (int64_t i = task * grain; i < end; ++i) backward_position(args, i / args.D, i % args.D, s);
  });
}

}  // namespace di4c::cpu::DI4C_ISA
