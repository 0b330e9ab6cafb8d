// Joint log-probability of K sequences under a mixture of L products, its correlation part, and the divergences of a
// teacher and of a target mixture from it. Per position, with mass(s) = sum_l p_l(s):
//   a_lk = log p_l(x_k) in doubles, since thousands of positions are added up; c_lk = sum_d w (a_lk - LME_l a_lk)
//   KL(t || pbar) = sum_s t (r - 1 - log r), r = mass / (L t);  pull_l = sum_s t p_l / mass
//   mean_l KL(t || p_l) = sum_s t (log t - mean_l log p_l) + mass / L - t
// A row is read once where the L rows of exponentials stay in cache; otherwise the strips read it a second time.
#include "kernels.h"
#include "mixture_short_kernels.h"
#include "mixture_sums.h"
#include "mixture_tokens.h"

namespace di4c::cpu::DI4C_ISA {
namespace {

constexpr int kColumns = 64;  // whose masses are added up in registers

// What is known of one position once its rows have been read.
struct Position {
  Rows logits;
  Tokens tokens;
  double *sum, *log_sum;        // (padded L)
  float *chunk_max, *e, *centred;  // (L, chunks), (L, stride), (wide)
  double w;
};

struct Forward {
  const MixtureArgs& args;
  Arena arena;
  const bool divergent;                    // any part is wanted
  const int64_t S, L, chunks, wide, stride;  // wide: S padded; stride: between rows of e
  const bool table;                        // e holds whole rows, not strips
  const int64_t group;                     // positions whose rows are read together
  Position read_positions[kPositions], *here;
  Rows teacher, target;
  KeptLines lines;  // of the block's positions
  Lines rows;
  const int64_t Kp;
  double *a, *total;              // (L, Kp), (L + 1, Kp)
  float *t, *g, *one, *room;      // (wide) each
  double *pull, *target_pull;         // (planes, L), and the target's plane, the last
  double* offset;                     // (chunks): what `centred` lacks of a sum of log-probabilities
  double part[kParts];
  float *mass, *share, *buffer;       // (kChunk) each, buffer of two rows

  Forward(const MixtureArgs& x, void* memory)
      : args(x), arena(memory), divergent(x.teacher.data || x.T > 0 || x.information),
        S(x.S), L(x.L), chunks(ceil_div(S, kChunk)), wide(padded(S)),
        stride((L * wide * 4 <= kTableBytes ? wide : kChunk) + W), table(L * wide * 4 <= kTableBytes),
        group(divergent ? group_of(L, S) : kPositions), here(read_positions), teacher(arena, x.teacher.data ? 1 : 0),
        target(arena, x.T), lines(arena, x), rows(arena, kParts), Kp(Tokens::pad(x.K)) {
    for (int64_t i = 0; i < group; ++i) {
      Position& p = read_positions[i];
      p.logits = Rows(arena, L);
      p.tokens = Tokens(arena, L, x.K);
      p.sum = arena.take<double>(padded(L));
      p.log_sum = arena.take<double>(padded(L));
      p.chunk_max = arena.take<float>(L * chunks);
      p.e = arena.take<float>(divergent ? L * stride : 0);
      p.centred = arena.take<float>(x.teacher.data ? wide : 0);
    }
    a = arena.take<double>(L * Kp);
    total = arena.take<double>((L + 1) * Kp);
    pull = arena.take<double>(2 * L);
    target_pull = pull + (x.teacher.data ? L : 0);
    offset = arena.take<double>(chunks);
    t = arena.take<float>(x.teacher.data ? wide : 0);
    g = arena.take<float>(x.T > 0 ? wide : 0);
    one = arena.take<float>(x.T > 1 ? wide : 0);
    room = arena.take<float>(x.logits.dtype == kLogistic ? wide : 0);
    mass = arena.take<float>(kChunk);
    share = arena.take<float>(kChunk);
    buffer = arena.take<float>(2 * kChunk);
  }

  bool distils(int64_t b) const { return args.teacher.data && (!args.inside || is_inside(args.inside, b)); }
  bool aims(int64_t b) const { return args.T > 0 && !is_inside(args.inside, b); }

  // All that is written of positions first .. end.
  void block(int64_t b, int64_t first, int64_t end, double* work) {
    for (int64_t i = 0; i < (L + 1) * Kp; ++i) total[i] = 0;
    for (int64_t d = first; d < end; d += group) {
      const int64_t n = end - d < group ? end - d : group;
      read_components(b, d, n);
      for (int64_t i = 0; i < n; ++i) {
        here = read_positions + i;
        position(b, d + i);
        const int64_t at = d + i - first;
        here->logits.keep_all(lines.lse, at);
        teacher.keep_all(lines.lse_teacher, at);
        target.keep_all(lines.lse_target, at);
        for (int64_t q = 0; q < kParts; ++q) rows.at(q, at) = static_cast<float>(part[q]);
        for (int64_t l = 0; l < lines.pulls.count; ++l) lines.pulls.at(l, at) = static_cast<float>(pull[l]);
      }
    }
    lines.write(args, b, first, end - first);
    rows.write(args.row, 1, args.B, args.D, b, first, end - first);
    for (int64_t l = 0; l <= L; ++l)
      for (int64_t k = 0; k < args.K; ++k) work[l * args.K + k] = total[l * Kp + k];
  }

  // Whether position d has one after it that is read.
  bool goes_on(int64_t b, int64_t d) const { return d + 1 < args.D && weight_at(args.weight, b * args.D + d + 1) != 0; }

  // Normalisers and exponentials of the L rows of positions d .. d + n, their logits at the tokens, and the sums of
  // logits less chunk maxima.
  void read_components(int64_t b, int64_t d, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      Position& p = read_positions[i];
      p.w = weight_at(args.weight, b * args.D + d + i);
      for (int64_t l = 0; l < L; ++l) p.logits.norm[l] = {};
      if (p.w == 0) continue;
      p.logits.find(args.logits, S, b, d + i);
      if (args.K > 0) p.tokens.find(args, b, d + i);
    }
    const Position* used[kPositions];
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i)
      if (read_positions[i].w != 0) used[count++] = read_positions + i;
    const bool plain = !divergent && args.logits.dtype != kLogistic;
    const int64_t far = rows_ahead(S * element_size(args.logits.dtype));
    const int64_t onward = goes_on(b, d + n - 1) ? n * args.logits.stride_d : -1;
    const auto after = [&](int64_t l, int64_t i) {  // what is read some rows after row l of used[i]
      const int64_t at = l * count + i + far, row = at / count;
      if (row < L) return soon(used[at % count]->logits.row[row], 0);
      return onward < 0 || row >= 2 * L ? Soon{} : soon(used[at % count]->logits.row[row - L], onward);
    };
    for (int64_t l = 0; l < L; ++l) {
      int64_t i = 0;
      for (; plain && i + 2 <= count; i += 2) read_plain<2>(used + i, l, {after(l, i), after(l, i + 1)});
      for (; plain && i < count; ++i) read_plain<1>(used + i, l, {after(l, i)});
      for (; i < count; ++i) read_row(*used[i], l, after(l, i), distils(b));
    }
    for (int64_t i = 0; i < n; ++i) {
      const Position& p = read_positions[i];
      if (p.w == 0) continue;
      for (int64_t l = L; l < padded(L); ++l) p.sum[l] = 1;
      for (int64_t l = 0; l < L; l += W / 2) store(p.log_sum + l, log_from_one(load(p.sum + l)));
      for (int64_t l = 0; l < L; ++l) p.logits.norm[l].log_sum = static_cast<float>(p.log_sum[l]);
    }
  }

  // Row l of N positions, of which nothing but normaliser and tokens is wanted.
  template <int N>
  void read_plain(const Position* const* positions, int64_t l, const Soon (&next)[N]) {
    const Row* rows_l[N];
    float* buffers[N];
    RowSum found[N];
    const float* floats[N] = {};
    for (int r = 0; r < N; ++r) rows_l[r] = positions[r]->logits.row + l, buffers[r] = buffer + r * kChunk;
    sum_rows<N>(rows_l, buffers, next, found, floats);
    for (int r = 0; r < N; ++r) {
      const Position& p = *positions[r];
      if (args.K > 0) p.tokens.gather(l, *rows_l[r], chunks == 1 ? floats[r] : nullptr);
      p.logits.norm[l].max = found[r].max;
      p.sum[l] = found[r].sum;
    }
  }

  void read_row(const Position& p, int64_t l, Soon next, bool centre) {
    const Row row = computed(p.logits.row[l], room);
    const float* floats = nullptr;  // the whole row where one chunk is all
    const RowSum found = sum_row(row, buffer, table && divergent ? p.e + l * stride : nullptr,
                                 p.chunk_max + l * chunks, next, [&](int64_t start, int n, const float* x, float m) {
      if (chunks == 1) floats = x;
      if (!centre) return;
      const f32 shift = set(m == -kInf ? 0.0f : m);
      float* to = p.centred + start;
      if (l == 0)
        each(x, n, 0.0f, DI4C_EACH(int, int i, int, f32 v) { store(to + i, v - shift); });
      else
        each(x, n, 0.0f, DI4C_EACH(int, int i, int, f32 v) { store(to + i, load(to + i) + (v - shift)); });
    });
    if (args.K > 0) p.tokens.gather(l, row, floats);
    p.logits.norm[l].max = found.max;
    p.sum[l] = found.sum;
  }

  void position(int64_t b, int64_t d) {
    for (double& p : part) p = 0;
    for (int64_t i = 0; i < 2 * L; ++i) pull[i] = 0;
    for (int64_t i = 0; i < teacher.count; ++i) teacher.norm[i] = {};
    for (int64_t i = 0; i < target.count; ++i) target.norm[i] = {};
    if (here->w == 0) return;
    const bool more = goes_on(b, d);
    if (args.teacher.data) {
      teacher.find(args.teacher, S, b, d);
      mean_probabilities(teacher, S, more ? args.teacher.stride_d : -1, buffer, one, t);
    }
    if (aims(b)) {
      target.find(args.target, S, b, d);
      mean_probabilities(target, S, more ? args.target.stride_d : -1, buffer, one, g);
    }
    if (args.K > 0) add_tokens(here->w);
    if (divergent) add_divergences(b);
  }

  void add_tokens(double w) {
    const f64 none = set(-static_cast<double>(kInf)), log_count = set(::log(static_cast<double>(L)));
    for (int64_t k = 0; k < Kp; k += W) {
      f64 top[2] = {none, none};
      for (int64_t l = 0; l < L; ++l) {
        const f32 x = load(here->tokens.x + l * Kp + k);
        for (int h = 0; h < 2; ++h) {
          const f64 now = (widen(x, h) - static_cast<double>(here->logits.norm[l].max)) - here->log_sum[l];
          store(a + l * Kp + k + h * W / 2, now);
          top[h] = (now > top[h]) | (now != now) ? now : top[h];
        }
      }
      f32 mass_k = {};
      for (int64_t l = 0; l < L; ++l) {
        const double* now = a + l * Kp + k;
        mass_k += exp_nonpos(narrow(load(now) - top[0], load(now + W / 2) - top[1]));
      }
      for (int h = 0; h < 2; ++h) {
        const int64_t at = k + h * W / 2;
        const auto dead = top[h] == none;  // no component has the token: -inf in joint, nothing in correlation
        const f64 lme = dead ? none : top[h] + (log_from_one(widen(mass_k, h)) - log_count);
        store(total + L * Kp + at, load(total + L * Kp + at) + w * lme);
        for (int64_t l = 0; l < L; ++l) {
          double* to = total + l * Kp + at;
          store(to, load(to) + (dead ? f64{} : w * (load(a + l * Kp + at) - lme)));
        }
      }
    }
    for (int64_t k = 0; k < args.K; ++k)
      if (here->tokens.outside[k]) total[L * Kp + k] = total[k] = __builtin_nan("");
  }

  void add_divergences(int64_t b) {
    for (int64_t c = 0; c < chunks; ++c) {
      offset[c] = 0;
      for (int64_t l = 0; l < L; ++l)
        offset[c] += (here->chunk_max[l * chunks + c] - here->logits.norm[l].max) - here->log_sum[l];
    }
    for (int64_t l = 0; l < L && table; ++l)
      chunk_factors(here->chunk_max + l * chunks, chunks, here->logits.norm[l], 1.0f);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t start = c * kChunk;
      const int n = min_int(S - start, kChunk);
      const Strip strip = probabilities(c, start, n);
      const bool far = add_masses(strip, n);
      if (args.teacher.data) {
        part[kMarginalTeacher] += divergence(t + start, n);
        add_pulls(strip, n, pull);
      }
      if (distils(b)) part[kDistillation] += spread(start, n, static_cast<float>(offset[c] / static_cast<double>(L)));
      if (aims(b)) {
        part[kMarginalTarget] += divergence(g + start, n);
        add_pulls(strip, n, target_pull);
      }
      if (args.information) {
        const f32 by = set(strip.factor[0]);
        for (int j = 0; j < n; j += W) store(share + j, load(strip.e + j) * by);
        part[kInformation] += divergence(share, n);
      }
      for (int j = 0; far && j < n; j += kLanes) add_far(b, start + j, j, min_int(n - j, kLanes));
    }
  }

  struct Strip {  // p_l(s) = e[l stride + s] factor[l step]
    const float *e, *factor;
    int64_t step;
  };

  Strip probabilities(int64_t c, int64_t start, int n) {
    if (table) return {here->e + start, here->chunk_max + c, chunks};
    for (int64_t l = 0; l < L; ++l) {
      const Norm norm = here->logits.norm[l];
      float* to = here->e + l * stride;
      const Soon ask = here->logits.ahead(l, start, n, start + n < S ? start + n : -1);
      each(read(here->logits.row[l], start, n, buffer), n, -kInf, DI4C_EACH(int, int i, int, f32 v) {
        ask(i);
        store(to + i, exp_nonpos(v - norm.max - norm.log_sum));
      });
    }
    static const float kOne = 1.0f;
    return {here->e, &kOne, 0};
  }

  // mass(s) of the strip; true if any is tiny.
  bool add_masses(const Strip& strip, int n) {
    for (int j = 0; j < n; j += kColumns) {
      f32 now[kColumns / W] = {};
      for (int64_t l = 0; l < L; ++l) {
        const f32 by = set(strip.factor[l * strip.step]);
        const float* row = strip.e + l * stride + j;
        for (int i = 0; i < kColumns / W; ++i)
          if (j + i * W < n) now[i] = fma(load(row + i * W), by, now[i]);
      }
      for (int i = 0; i < kColumns / W; ++i) store(mass + j + i * W, now[i]);
    }
    f32 tiny = {};
    each(mass, n, 1.0f, DI4C_EACH(int, int, int, f32 v) { tiny = v < kTiny ? set(1.0f) : tiny; });
    return sum_lanes(tiny) != 0.0f;
  }

  // sum_s t (r - 1 - log r) where the mass is not tiny; leaves t / mass in `share`.
  double divergence(const float* source, int n) {
    const f32 inverse = set(1.0f / static_cast<float>(L));
    f32 sum_kl[U] = {};
    each(mass, n, 0.0f, DI4C_EACH(int u, int j, int count, f32 v) {
      const f32 q = count < W ? load(source + j, count, 0.0f) : load(source + j), p = v * inverse;
      const f32 term = q < kTiny ? p - q : q * log_excess(p / q);
      sum_kl[u] += v < kTiny ? f32{} : term;
      store(share + j, v < kTiny ? f32{} : q / v);
    });
    return sum_block(sum_kl);
  }

  void add_pulls(const Strip& strip, int n, double* to) {
    for (int64_t l = 0; l < L; ++l) {
      const float* row = strip.e + l * stride;
      f32 now[U] = {};
      each(share, n, 0.0f, DI4C_EACH(int u, int j, int, f32 q) { now[u] = fma(q, load(row + j), now[u]); });
      to[l] += static_cast<double>(strip.factor[l * strip.step]) * sum_block(now);
    }
  }

  // sum_s t (log t - mean_l log p_l) + mass / L - t; no mass is too small for it.
  double spread(int64_t start, int n, float offset) {
    const f32 inverse = set(1.0f / static_cast<float>(L));
    const Norm norm = teacher.norm[0];
    const float* x = read(teacher.row[0], start, n, buffer);
    f32 now[U] = {};
    each(x, n, -kInf, DI4C_EACH(int u, int j, int count, f32 v) {
      const f32 log_t = v - norm.max - norm.log_sum, q = load(t + start + j, count, 0.0f);
      const f32 mean = fma(load(here->centred + start + j, count, 0.0f), inverse, set(offset));
      const f32 term = (mean == -kInf) & (log_t > -kInf) ? set(kInf) : q == 0.0f ? f32{} : q * (log_t - mean);
      now[u] += term + (load(mass + j, count, 0.0f) * inverse - q);
    });
    return sum_block(now);
  }

  // The tiny lanes of columns [start, start + n), through logarithms. A class that nobody has, as masked ones are, is
  // seen to be nothing before any are taken.
  void add_far(int64_t b, int64_t start, int j, int n) {
    const Lanes tiny = tiny_lanes(mass + j, n), top = largest(here->logits, start, n);
    const bool found = any(top, tiny) || (args.teacher.data && any(largest(teacher, start, n), tiny)) ||
                       (aims(b) && any(largest(target, start, n), tiny));
    if (!found) return;
    const LogMean mean = log_mean(here->logits, top, start, n);
    const auto against = [&](const Rows& source, double& kl, double* to) {
      const LogMean log_t = log_mean(source, largest(source, start, n), start, n);
      f32 q[U], terms[U];
      for (int u = 0; u < U; ++u) {
        const auto out = tiny.v[u] == 0.0f;
        q[u] = out ? f32{} : exp_nonpos(log_t.value.v[u]);
        const f32 term = kl_term(q[u], log_t.value.v[u], exp_nonpos(mean.value.v[u]), mean.value.v[u]);
        terms[u] = out ? f32{} : term;
        q[u] = mean.sum.v[u] == 0.0f ? f32{} : q[u] / mean.sum.v[u];
      }
      kl += sum_block(terms);
      for (int64_t l = 0; l < L && to; ++l) {
        Lanes shares = relative(here->logits, l, top, start, n);
        for (int u = 0; u < U; ++u) shares.v[u] *= q[u];
        to[l] += sum_block(shares.v);
      }
    };
    if (args.teacher.data) against(teacher, part[kMarginalTeacher], pull);
    if (aims(b)) against(target, part[kMarginalTarget], target_pull);
    if (args.information) {
      Rows first = here->logits;
      first.count = 1;
      against(first, part[kInformation], nullptr);
    }
  }
};

}  // namespace

void mixture_positions(const MixtureArgs& args, int threads) {
  if (args.L <= 0 || args.S <= 0) return;
  if (is_short(args)) return short_positions(args, threads);
  const int64_t blocks = ceil_div(args.D, kPositions);
  const int64_t rows = args.L + args.T + (args.teacher.data ? 1 : 0);
  const int64_t elements = args.B * args.D * (rows * args.S + args.L * args.K);
  parallel(args.B * blocks, threads, elements, Forward(args, nullptr).arena.used(), [&](int64_t task, void* memory) {
    const int64_t b = task / blocks, first = task % blocks * kPositions;
    const int64_t end = first + kPositions < args.D ? first + kPositions : args.D;
    Forward(args, memory).block(b, first, end, args.work + task * (args.L + 1) * args.K);
  });
}

}  // namespace di4c::cpu::DI4C_ISA
