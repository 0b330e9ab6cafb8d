// The gradient of everything that mixture_positions and mixture_finish give: one read of the logits, one write. With
// t the teacher, g the target, coefficient_lk = w ((gj_k + gc_k) share_lk - gc_k rho_lk), rho = softmax_l a_lk (0 where
// no component has the token):
//   dlogits_ls = p_l (A_l - (w G_mt t + w G_mg g) / mass) - w G_dist / L t + sum_k coefficient_lk [s = x_k]
//   A_l = w (G_mt pull^t_l + G_mg pull^g_l + G_dist / L) - sum_k coefficient_lk
// A strip of columns is computed for all L rows before any of it is written: the gradient may overwrite the logits.
#include "kernels.h"
#include "mixture_short_kernels.h"
#include "mixture_tokens.h"

namespace di4c::cpu::DI4C_ISA {
namespace {

constexpr int64_t kStripFloats = 8192;       // of all L rows' strips: 32 KiB stay in the first cache
constexpr int kNarrowest = 64;
constexpr float kFarScale = 0x1p60f;         // see far()
constexpr int64_t kStreamBytes = 16 << 20;  // a gradient from this size on is written past the caches

// Whole vectors go past the caches; the ends of a piece, whose lines it shares with others, do not.
void copy_past(void* target, const void* source, int64_t bytes) {
  char* to = static_cast<char*>(target);
  const char* from = static_cast<const char*>(source);
  const int64_t size = sizeof(f32), gap = (0 - reinterpret_cast<uintptr_t>(to)) % static_cast<uintptr_t>(size);
  const int64_t head = gap < bytes ? gap : bytes;
  if (head) memcpy(to, from, static_cast<size_t>(head));
  int64_t i = head;
  for (; i + size <= bytes; i += size) {
    f32 v;
    memcpy(&v, from + i, sizeof v);
    stream(to + i, v);
  }
  if (i < bytes) memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
}

struct Backward {
  const MixtureBackwardArgs& args;
  Arena arena;
  const int64_t S, L;
  const DType dtype;
  const bool past;  // the caches
  const int columns, stride, strips;
  Rows logits, teacher, target;
  KeptLines lines;  // of a few positions
  Tokens tokens;
  float *slope;               // (L): A_l
  float *e, *mass, *rho, *t, *out, *buffer;  // (L, stride), (columns) each, (kChunk) each
  int64_t *first, *order;     // tokens by strip: (strips + 1), (K)
  LogisticSum* head;          // (L)

  static int columns_of(int64_t L) {
    const int64_t n = kStripFloats / (L < 1 ? 1 : L) / kNarrowest * kNarrowest;
    return static_cast<int>(n < kNarrowest ? kNarrowest : n > kChunk ? kChunk : n);
  }

  Backward(const MixtureBackwardArgs& x, void* memory)
      : args(x), arena(memory), S(x.S), L(x.L), dtype(x.logits.dtype),
        past(x.grad != x.logits.data && x.B * L * x.D * row_bytes(dtype, S) >= kStreamBytes),
        columns(x.teacher.data || x.T > 0 ? columns_of(L) : kChunk), stride(columns + W),
        strips(static_cast<int>(ceil_div(S, columns))), logits(arena, L), teacher(arena, x.teacher.data ? 1 : 0),
        target(arena, x.T), lines(arena, x), tokens(arena, L, x.K) {
    slope = arena.take<float>(L);
    e = arena.take<float>(x.teacher.data || x.T > 0 ? L * stride : 0);
    mass = arena.take<float>(columns);
    rho = arena.take<float>(columns);
    t = arena.take<float>(columns);
    out = arena.take<float>(kChunk);
    buffer = arena.take<float>(kChunk);
    first = arena.take<int64_t>(strips + 1);
    order = arena.take<int64_t>(x.K);
    head = arena.take<LogisticSum>(dtype == kLogistic ? L : 0);
  }

  void position(int64_t b, int64_t d, int64_t at) {
    const float w = weight_at(args.weight, b * args.D + d);
    if (w == 0) {
      for (int64_t l = 0; l < L; ++l) zero_row(args.grad, dtype, row_of(b, l, d), S);
      return;
    }
    const PartGradients parts(args, b, w);
    logits.find(args.logits, S, b, d);
    logits.recall(lines.lse, at);
    for (int64_t l = 0; l < L; ++l) slope[l] = parts.slope(lines.pulls, L, l, at);
    if (args.K > 0) find_coefficients(b, d, w);
    for (int64_t l = 0; l < L && dtype == kLogistic; ++l) head[l] = {};
    if (parts.distillation != 0 || parts.to_teacher != 0) {
      teacher.find(args.teacher, S, b, d);
      teacher.recall(lines.lse_teacher, at);
    }
    if (parts.to_target != 0) {
      target.find(args.target, S, b, d);
      target.recall(lines.lse_target, at);
    }
    if (parts.any())
      for (int strip = 0; strip < strips; ++strip) write_together(b, d, strip, parts);
    else
      for (int64_t l = 0; l < L; ++l)
        for (int strip = 0; strip < strips; ++strip) write_alone(b, l, d, strip);
    for (int64_t l = 0; l < L && dtype == kLogistic; ++l) {
      float* grad = reinterpret_cast<float*>(grad_row(args.grad, dtype, row_of(b, l, d), S));
      grad[0] = static_cast<float>(head[l].mean);
      grad[1] = static_cast<float>(head[l].log_scale);
    }
  }

  int64_t row_of(int64_t b, int64_t l, int64_t d) const { return (b * L + l) * args.D + d; }

  // coefficient_lk in place of the logits at the tokens, taken from the slopes, and the tokens' order by strip.
  void find_coefficients(int64_t b, int64_t d, float w) {
    tokens.find(args, b, d);
    for (int64_t l = 0; l < L; ++l) tokens.gather(l, logits.row[l], nullptr);
    const int64_t K = args.K, Kp = tokens.Kp;
    for (int64_t k = 0; k < K; k += W) {
      const int n = min_int(K - k, W);
      f32 top = set(-kInf), sum = {};
      for (int64_t l = 0; l < L; ++l) {
        float* x = tokens.x + l * Kp + k;
        const f32 a = load(x) - logits.norm[l].max - logits.norm[l].log_sum;
        store(x, a);
        top = (a > top) | (a != a) ? a : top;
      }
      for (int64_t l = 0; l < L; ++l) {
        float* x = tokens.x + l * Kp + k;
        const f32 now = exp_nonpos(load(x) - top);
        store(x, now);
        sum += now;
      }
      const f32 gc = load(args.grad_correlation + b * K + k, n, 0.0f);
      const f32 both = load(args.grad_joint + b * K + k, n, 0.0f) + gc, inverse = gc / sum;
      for (int64_t l = 0; l < L; ++l) {
        float* x = tokens.x + l * Kp + k;
        const f32 share = load(args.share + (b * L + l) * K + k, n, 0.0f);
        const f32 c = top == -kInf ? f32{} : w * (both * share - inverse * load(x));
        store(x, c);
      }
    }
    for (int64_t l = 0; l < L; ++l) {
      f32 sum[U] = {};  // what is padded is 0
      for (int64_t k = 0; k < Kp; k += W) sum[k / W % U] += load(tokens.x + l * Kp + k);
      slope[l] -= sum_block(sum);
    }
    for (int strip = 0; strip <= strips; ++strip) first[strip] = 0;
    for (int64_t k = 0; k < K; ++k) ++first[tokens.token[k] / columns + 1];
    for (int strip = 0; strip < strips; ++strip) first[strip + 1] += first[strip];
    for (int64_t k = K; k-- > 0;) order[--first[tokens.token[k] / columns + 1]] = k;
    for (int strip = 0; strip < strips; ++strip) first[strip] = first[strip + 1];
    first[strips] = K;
  }

  // A strip of one row's gradient as floats is in `piece`: adds what the tokens bring and writes it.
  void finish_piece(int64_t b, int64_t l, int64_t d, int strip, int n, float* piece) {
    const int64_t start = static_cast<int64_t>(strip) * columns;
    for (int64_t i = args.K > 0 ? first[strip] : 0; args.K > 0 && i < first[strip + 1]; ++i) {
      const int64_t k = order[i];
      if (!tokens.outside[k]) piece[tokens.token[k] - start] += tokens.x[l * tokens.Kp + k];
    }
    char* grad = grad_row(args.grad, dtype, row_of(b, l, d), S);
    if (dtype == kLogistic) return logistic_pull(logits.row[l], start, n, piece, head[l]);
    if (!past) return write(grad, dtype, start, n, piece);
    if (dtype != kFloat32) write(buffer, dtype, 0, n, piece);
    copy_past(grad + row_bytes(dtype, start), dtype == kFloat32 ? piece : buffer, row_bytes(dtype, n));
  }

  float* piece_of(int64_t b, int64_t l, int64_t d, int64_t start) {
    return past ? out : write_target(grad_row(args.grad, dtype, row_of(b, l, d), S), dtype, start, out);
  }

  // No divergence has a gradient: rows need not know of each other.
  void write_alone(int64_t b, int64_t l, int64_t d, int strip) {
    const int64_t start = static_cast<int64_t>(strip) * columns;
    const int n = min_int(S - start, columns);
    const Norm norm = logits.norm[l];
    const f32 by = set(slope[l]);
    float* piece = piece_of(b, l, d, start);
    each(read(logits.row[l], start, n, buffer), n, -kInf, DI4C_EACH(int, int i, int count, f32 v) {
      store(piece + i, count, by * exp_nonpos(v - norm.max - norm.log_sum));
    });
    finish_piece(b, l, d, strip, n, piece);
  }

  void write_together(int64_t b, int64_t d, int strip, const PartGradients& parts) {
    const float same = parts.distillation, to_teacher = parts.to_teacher, to_target = parts.to_target;
    const int64_t start = static_cast<int64_t>(strip) * columns;
    const int n = min_int(S - start, columns);
    for (int64_t l = 0; l < L; ++l) {
      const Norm norm = logits.norm[l];
      float* row = e + l * stride;
      each(read(logits.row[l], start, n, buffer), n, -kInf, DI4C_EACH(int, int i, int, f32 v) {
        const f32 p = exp_nonpos(v - norm.max - norm.log_sum);
        store(row + i, p);
        store(mass + i, l == 0 ? p : load(mass + i) + p);
      });
    }
    // rho and, in t, what does not hang on l
    for (int i = 0; i < n; i += W) store(rho + i, f32{}), store(t + i, f32{});
    if (same != 0 || to_teacher != 0) add_probabilities(teacher, start, n, DI4C_EACH(int i, f32 p) {
      store(rho + i, to_teacher * p);
      store(t + i, same * p);
    });
    const float share = to_target / static_cast<float>(args.T < 1 ? 1 : args.T);
    if (to_target != 0) add_probabilities(target, start, n, DI4C_EACH(int i, f32 p) {
      store(rho + i, fma(p, set(share), load(rho + i)));
    });
    f32 tiny = {};
    each(mass, n, 1.0f, DI4C_EACH(int, int i, int count, f32 v) {
      const f32 wanted = load(rho + i, count, 0.0f);
      tiny = (v < kTiny) & (wanted != 0.0f) ? set(1.0f) : tiny;
      store(rho + i, wanted == 0.0f ? f32{} : wanted / v);
    });
    if (sum_lanes(tiny) != 0.0f)
      for (int j = 0; j < n; j += kLanes)
        far(start, j, min_int(n - j, kLanes), parts);
    for (int64_t l = 0; l < L; ++l) {
      const f32 by = set(slope[l]);
      float* piece = piece_of(b, l, d, start);
      each(e + l * stride, n, 0.0f, DI4C_EACH(int, int i, int count, f32 p) {
        store(piece + i, count, fma(p, by - load(rho + i), -load(t + i)));
      });
      finish_piece(b, l, d, strip, n, piece);
    }
  }

  // f(i, p) for the vectors of each row's probabilities.
  template <typename F>
  void add_probabilities(const Rows& rows, int64_t start, int n, const F& f) {
    for (int64_t i = 0; i < rows.count; ++i) {
      const Norm norm = rows.norm[i];
      each(read(rows.row[i], start, n, buffer), n, -kInf,
           DI4C_EACH(int, int j, int, f32 v) { f(j, exp_nonpos(v - norm.max - norm.log_sum)); });
    }
  }

  // Where the mass of columns [start + j, start + j + n) is tiny, p_l gives way to p_l / mass / kFarScale and rho to
  // what stands over the mass times kFarScale: their product is as it should be, and p_l A_l is nothing either way.
  void far(int64_t start, int j, int n, const PartGradients& parts) {
    const Lanes tiny = tiny_lanes(mass + j, n), top = largest(logits, start + j, n);
    f32 sum[U] = {}, over[U] = {};
    for (int64_t l = 0; l < L; ++l) {
      const Lanes now = relative(logits, l, top, start + j, n);
      for (int u = 0; u < U; ++u) sum[u] += now.v[u];
    }
    for (int64_t l = 0; l < L; ++l) {
      const Lanes now = relative(logits, l, top, start + j, n);
      float* row = e + l * stride + j;
      for (int u = 0; u < U && u * W < n; ++u) {
        const f32 share = sum[u] == 0.0f ? f32{} : now.v[u] / sum[u] * (1.0f / kFarScale);
        store(row + u * W, tiny.v[u] == 0.0f ? load(row + u * W) : share);
      }
    }
    const auto collect = [&](const Rows& rows, float by) {
      for (int64_t i = 0; i < rows.count && by != 0; ++i) {
        const Lanes now = log_probs(rows.row[i], rows.norm[i], start + j, n);
        const f32 each_by = set(by / static_cast<float>(rows.count));
        for (int u = 0; u < U; ++u) over[u] = fma(each_by, exp_nonpos(now.v[u]), over[u]);
      }
    };
    collect(teacher, parts.to_teacher);
    collect(target, parts.to_target);
    for (int u = 0; u < U && u * W < n; ++u)
      store(rho + j + u * W, tiny.v[u] == 0.0f ? load(rho + j + u * W) : over[u] * kFarScale);
  }
};

}  // namespace

void mixture_backward(const MixtureBackwardArgs& args, int threads) {
  if (args.L <= 0 || args.S <= 0) return;
  if (is_short(args)) return short_backward(args, threads);
  constexpr int64_t kRun = 1 << 17;  // elements that a task takes at least, and at most a block of positions
  const int64_t rows = 2 * args.L + args.T, per_position = rows * args.S + args.L * args.K + 1;
  const int64_t length = per_position > kRun ? 1 : kRun / per_position < kPositions ? kRun / per_position : kPositions;
  const Runs runs(args.B * args.D, length, threads);
  parallel(runs.tasks, threads, args.B * args.D * per_position, Backward(args, nullptr).arena.used(),
           [&](int64_t task, void* memory) {
    Backward backward(args, memory);
    const int64_t first = runs.first(task);
    backward.lines.each_position(args, first, runs.end(first),
                                 [&](int64_t b, int64_t d, int64_t at) { backward.position(b, d, at); });
    fence();
  });
}

}  // namespace di4c::cpu::DI4C_ISA
