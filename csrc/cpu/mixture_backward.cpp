// The gradient of everything that mixture_positions and mixture_finish give: one read of the logits, one write. With
// t the teacher, g the target, coefficient_lk = w ((gj_k + gc_k) share_lk - gc_k rho_lk), rho = softmax_l a_lk (0 where
// no component has the token):
//   dlogits_ls = p_l (A_l - (w G_mt t + w G_mg g) / mass) - w G_dist / L t + sum_k coefficient_lk [s = x_k]
//   A_l = w (G_mt pull^t_l + G_mg pull^g_l + G_dist / L) - sum_k coefficient_lk
// A strip of columns is computed for all L rows before any of it is written: the gradient may overwrite the logits.
#include "kernels.h"
#include "mixture_backward_tokens.h"
#include "mixture_short_kernels.h"
#include "mixture_writer.h"

namespace di4c::cpu::DI4C_ISA {
namespace {

constexpr int64_t kStripFloats = 8192;       // of all L rows' strips: 32 KiB stay in the first cache
constexpr int kNarrowest = 64, kMostColumns = kChunk * 3 / 4;  // a third more is still a chunk
constexpr float kFarScale = 0x1p60f;         // see far()

struct Backward {
  const MixtureBackwardArgs& args;
  const int64_t S, L;
  const DType dtype;
  const int columns, stride, strips;
  Rows logits, teacher, target;
  Tokens tokens;
  GradientWriter writer;
  float *slope;               // (L): A_l
  float *e, *mass, *rho, *t, *buffer;  // (L, stride), (columns) each
  int64_t *first, *order;     // tokens by strip: (strips + 1), (K)
  LogisticSum* head;          // (L)

  static int columns_of(int64_t L, int64_t S) {
    const int64_t n = kStripFloats / (L < 1 ? 1 : L) / kNarrowest * kNarrowest;
    return static_cast<int>(even_piece(S, n < kNarrowest ? kNarrowest : n > kMostColumns ? kMostColumns : n));
  }

  Backward(const MixtureBackwardArgs& x, Arena& arena)
      : args(x), S(x.S), L(x.L), dtype(x.logits.dtype), columns(columns_of(L, S)), stride(columns + W),
        strips(static_cast<int>(ceil_div(S, columns))), logits(arena, L), teacher(arena, x.teacher.data ? 1 : 0),
        target(arena, x.T), tokens(arena, L, x.K), writer(x, arena, columns) {
    slope = arena.take<float>(L);
    e = arena.take<float>(L * stride);
    mass = arena.take<float>(columns);
    rho = arena.take<float>(columns);
    t = arena.take<float>(columns);
    buffer = arena.take<float>(columns);
    first = arena.take<int64_t>(strips + 1);
    order = arena.take<int64_t>(x.K);
    head = arena.take<LogisticSum>(dtype == kLogistic ? L : 0);
  }

  // Positions d .. d + n of sample b, whose lines are there.
  void block(int64_t b, int64_t d, int64_t n, const KeptLines& lines) {
    writer.start();
    for (int64_t at = 0; at < n; ++at) position(b, d + at, at, at + 1 < n, lines);
  }

  // `followed`: by the next position.
  void position(int64_t b, int64_t d, int64_t at, bool followed, const KeptLines& lines) {
    const float w = weight_at(args.weight, b * args.D + d);
    for (int64_t l = 0; l < L && w == 0; ++l) writer.zero(writer.place(b, l, d, followed));
    if (w == 0) return;
    const PartGradients parts(args, b, w);
    logits.find(args.logits, S, b, d);
    logits.recall(lines.lse, at);
    for (int64_t l = 0; l < L; ++l) slope[l] = parts.slope(lines.pulls, L, l, at);
    if (args.K > 0) {
      tokens.find(args, b, d);
      for (int64_t l = 0; l < L; ++l) tokens.gather(l, logits.row[l], nullptr);
      tokens.weigh(args, b, w, logits.norm, slope);
      tokens.deal(columns, strips, first, order);
    }
    for (int64_t l = 0; l < L && dtype == kLogistic; ++l) head[l] = {};
    if (parts.distillation != 0 || parts.to_teacher != 0) {
      teacher.find(args.teacher, S, b, d);
      teacher.recall(lines.lse_teacher, at);
    }
    if (parts.to_target != 0) {
      target.find(args.target, S, b, d);
      target.recall(lines.lse_target, at);
    }
    const bool more = d + 1 < args.D && weight_at(args.weight, b * args.D + d + 1) != 0;
    for (int strip = 0; strip < strips; ++strip) write_strip(b, d, strip, parts, more, followed);
    for (int64_t l = 0; l < L && dtype == kLogistic; ++l) writer.close(writer.place(b, l, d, followed), head[l]);
  }

  // `more`: the next position is read, too. `followed`: and written, right after this one.
  void write_strip(int64_t b, int64_t d, int strip, const PartGradients& parts, bool more, bool followed) {
    const float same = parts.distillation, to_teacher = parts.to_teacher, to_target = parts.to_target;
    const int64_t start = static_cast<int64_t>(strip) * columns;
    const int n = min_int(S - start, columns);
    const auto next = [&](const Logits& x) { return start + n < S ? start + n : more ? x.stride_d : -1; };
    for (int64_t l = 0; l < L; ++l) {
      const Norm norm = logits.norm[l];
      float* row = e + l * stride;
      const Soon ask = logits.ahead(l, start, n, next(args.logits));
      each(read(logits.row[l], start, n, buffer), n, -kInf, DI4C_EACH(int, int i, int, f32 v) {
        ask(i);
        const f32 p = exp_nonpos(v - norm.max - norm.log_sum);
        store(row + i, p);
        store(mass + i, l == 0 ? p : load(mass + i) + p);
      });
    }
    // rho and, in t, what does not hang on l
    for (int i = 0; i < n; i += W) store(rho + i, f32{}), store(t + i, f32{});
    if (same != 0 || to_teacher != 0) add_probabilities(teacher, start, n, next(args.teacher),
                                                        DI4C_EACH(int i, f32 p) {
      store(rho + i, to_teacher * p);
      store(t + i, same * p);
    });
    const float share = to_target / static_cast<float>(args.T < 1 ? 1 : args.T);
    if (to_target != 0) add_probabilities(target, start, n, next(args.target), DI4C_EACH(int i, f32 p) {
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
      const auto place = writer.place(b, l, d, followed);
      float* piece = writer.piece(place, start);
      each(e + l * stride, n, 0.0f, DI4C_EACH(int, int i, int count, f32 p) {
        store(piece + i, count, fma(p, by - load(rho + i), -load(t + i)));
      });
      if (args.K > 0)
        tokens.add(first[strip], first[strip + 1], order, tokens.x + l * tokens.Kp, start, piece);
      LogisticSum none{};
      writer.put(place, logits.row[l], start, n, piece, dtype == kLogistic ? head[l] : none);
    }
  }

  // f(i, p) for the vectors of each row's probabilities; `next` as for Rows::ahead.
  template <typename F>
  void add_probabilities(const Rows& rows, int64_t start, int n, int64_t next, const F& f) {
    for (int64_t i = 0; i < rows.count; ++i) {
      const Norm norm = rows.norm[i];
      const Soon ask = rows.ahead(i, start, n, next);
      each(read(rows.row[i], start, n, buffer), n, -kInf, DI4C_EACH(int, int j, int, f32 v) {
        ask(j);
        f(j, exp_nonpos(v - norm.max - norm.log_sum));
      });
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

// What a thread needs for its runs of positions.
template <typename Kind>
struct Run {
  Arena arena;
  KeptLines lines;  // of a few positions
  Kind kind;

  Run(const MixtureBackwardArgs& args, void* memory) : arena(memory), lines(arena, args), kind(args, arena) {}
};

template <typename Kind>
void run_all(const MixtureBackwardArgs& args, int threads) {
  constexpr int64_t kRun = 1 << 19;  // elements of a task of several positions; at most a block
  const int64_t rows = 2 * args.L + args.T, per_position = rows * args.S + args.L * args.K + 1;
  const int64_t fair = args.B * args.D / (4 * (threads < 1 ? 1 : threads));  // so that all threads have enough
  const int64_t most = fair < kPositions ? fair : kPositions, fitting = kRun / per_position;
  const int64_t asked = fitting < most ? fitting : most, length = asked < 1 ? 1 : asked;
  const Runs runs(args.B * args.D, length, threads);
  parallel(runs.tasks, threads, args.B * args.D * per_position, Run<Kind>(args, nullptr).arena.used(),
           [&](int64_t task, void* memory) {
    Run<Kind> run(args, memory);
    const int64_t first = runs.first(task);
    run.lines.each_run(args, first, runs.end(first),
                       [&](int64_t b, int64_t d, int64_t n) { run.kind.block(b, d, n, run.lines); });
    fence();
  });
}

}  // namespace

void mixture_backward(const MixtureBackwardArgs& args, int threads) {
  if (args.L <= 0 || args.S <= 0) return;
  if (is_short(args)) return short_backward(args, threads);
  if (args.teacher.data || args.T > 0) return run_all<Backward>(args, threads);
  run_all<TokensBackward>(args, threads);
}

}  // namespace di4c::cpu::DI4C_ISA
