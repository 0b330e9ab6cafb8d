// What the mixture's forward and backward share: memory of a thread, the rows of a position, the order of the work.
//
// Everything is done one position at a time: its L rows (and the teacher's, and the target's T) are walked together in
// strips of columns, so that a class's mass(s) = sum_l p_l(s) is at hand. Masses and probabilities are plain floats,
// one exponential each. Where a mass is too small for that (below kTiny: a class far down the tail of every
// component), shares p_l(s) / mass(s) and log masses are taken through logarithms instead, kLanes columns at a time.
#pragma once
#include "divergence.h"

namespace di4c::cpu::DI4C_ISA {

constexpr float kTiny = 1e-30f;
constexpr int64_t kTableBytes = 512 << 10;  // of a position's probabilities, which are to stay in the second cache
constexpr int64_t kAhead = 4 << 10;         // bytes that are asked for before they are read
constexpr int64_t kGroupBytes = 256 << 10;  // of a few positions'

static inline bool is_inside(const uint8_t* inside, int64_t b) { return inside && inside[b] != 0; }
static inline int64_t padded(int64_t n) { return ceil_div(n, kLanes) * kLanes; }

// Hands out a thread's memory piece by piece, each aligned to a cache line; from null it only counts bytes.
class Arena {
 public:
  explicit Arena(void* memory) : start_(static_cast<char*>(memory)) {}
  template <typename T>
  T* take(int64_t count) {
    T* piece = start_ ? reinterpret_cast<T*>(start_ + used_) : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* start_;
  size_t used_ = 0;
};

// What is kept of a few successive positions, a line of them to each of `count` (plane, row) pairs. In memory those
// lines lie D apart, at worst all in one set of the cache, so they are read and written whole.
struct Lines {
  int64_t count;
  float* values;  // (count, kPositions)

  Lines(Arena& arena, int64_t n) : count(n), values(arena.take<float>(n * kPositions)) {}
  float& at(int64_t i, int64_t position) const { return values[i * kPositions + position]; }

  // Positions d .. d + n of planes (count / rows, B, rows, D).
  void write(float* planes, int64_t rows, int64_t B, int64_t D, int64_t b, int64_t d, int64_t n) const {
    for (int64_t i = 0; i < count; ++i)
      memcpy(planes + ((i / rows * B + b) * rows + i % rows) * D + d, &at(i, 0), static_cast<size_t>(n) * 4);
  }
  void read(const float* planes, int64_t rows, int64_t B, int64_t D, int64_t b, int64_t d, int64_t n) const {
    for (int64_t i = 0; i < count; ++i)
      memcpy(&at(i, 0), planes + ((i / rows * B + b) * rows + i % rows) * D + d, static_cast<size_t>(n) * 4);
  }
};

// What forward keeps for backward of a few successive positions.
struct KeptLines {
  Lines lse, lse_teacher, lse_target, pulls;

  template <typename Args>
  KeptLines(Arena& arena, const Args& x)
      : lse(arena, 2 * x.L), lse_teacher(arena, x.teacher.data ? 2 : 0), lse_target(arena, 2 * x.T),
        pulls(arena, (x.teacher.data ? x.L : 0) + (x.T > 0 ? x.L : 0)) {}

  void write(const MixtureArgs& x, int64_t b, int64_t d, int64_t n) const {
    lse.write(x.lse, x.L, x.B, x.D, b, d, n);
    lse_teacher.write(x.lse_teacher, 1, x.B, x.D, b, d, n);
    lse_target.write(x.lse_target, x.T, x.B, x.D, b, d, n);
    pulls.write(x.pull, x.L, x.B, x.D, b, d, n);
  }
  void read(const MixtureBackwardArgs& x, int64_t b, int64_t d, int64_t n) const {
    lse.read(x.lse, x.L, x.B, x.D, b, d, n);
    lse_teacher.read(x.lse_teacher, 1, x.B, x.D, b, d, n);
    lse_target.read(x.lse_target, x.T, x.B, x.D, b, d, n);
    pulls.read(x.pull, x.L, x.B, x.D, b, d, n);
  }

  // Positions first .. end of all B D, sample by sample, at most kPositions of them: f(b, d, n) finds the lines of
  // d .. d + n.
  template <typename F>
  void each_run(const MixtureBackwardArgs& x, int64_t first, int64_t end, const F& f) const {
    for (int64_t i = first; i < end;) {
      const int64_t b = i / x.D, d = i % x.D, n = end - i < x.D - d ? end - i : x.D - d;
      read(x, b, d, n);
      f(b, d, n);
      i += n;
    }
  }
};

// The gradients of a position's parts times its weight w: of each p_l in the distillation, and of the two marginals.
struct PartGradients {
  float distillation, to_teacher, to_target;

  PartGradients(const MixtureBackwardArgs& x, int64_t b, float w) {
    const bool inside = is_inside(x.inside, b), distils = x.teacher.data && (inside || !x.inside);
    const float* parts = x.grad_parts + b;
    distillation = distils ? w * parts[kDistillation * x.B] / static_cast<float>(x.L) : 0.0f;
    to_teacher = x.teacher.data ? w * parts[kMarginalTeacher * x.B] : 0.0f;
    to_target = x.T > 0 && !inside ? w * parts[kMarginalTarget * x.B] : 0.0f;
  }

  bool any() const { return distillation != 0 || to_teacher != 0 || to_target != 0; }

  // What multiplies p_l, but for the tokens.
  float slope(const Lines& pulls, int64_t L, int64_t l, int64_t at) const {
    float sum = distillation;
    if (to_teacher != 0) sum = fmaf(to_teacher, pulls.at(l, at), sum);
    if (to_target != 0) sum = fmaf(to_target, pulls.at(pulls.count - L + l, at), sum);
    return sum;
  }
};

// How many rows are read, of `bytes` each, while those that were asked for come.
static inline int64_t rows_ahead(int64_t bytes) { return bytes < 1 ? 1 : ceil_div(kAhead, bytes); }

// One position's rows of some logits, their normalisers among them.
struct Rows {
  int64_t count = 0;
  Row* row = nullptr;
  Norm* norm = nullptr;

  Rows() = default;
  Rows(Arena& arena, int64_t n) : count(n), row(arena.take<Row>(n)), norm(arena.take<Norm>(n)) {}
  void find(const Logits& x, int64_t S, int64_t b, int64_t d) const {
    for (int64_t i = 0; i < count; ++i) row[i] = row_at(x, S, b, i, d);
  }
  // What is read some kAhead bytes after elements [start, start + n) of row i, where those of all rows are read one row
  // after the other, and then those that lie `next` elements from each row's first; nothing where that is -1.
  Soon ahead(int64_t i, int64_t start, int64_t n, int64_t next) const {
    const int64_t far = i + rows_ahead(n * element_size(row[i].dtype));
    if (far < count) return soon(row[far], start);
    return next < 0 ? Soon{} : soon(row[far < 2 * count ? far - count : count - 1], next);
  }
  void recall(const Lines& planes, int64_t at) const {
    for (int64_t i = 0; i < count; ++i) norm[i] = {planes.at(i, at), planes.at(count + i, at)};
  }
  void keep_all(const Lines& planes, int64_t at) const {
    for (int64_t i = 0; i < count; ++i) planes.at(i, at) = norm[i].max, planes.at(count + i, at) = norm[i].log_sum;
  }
};

// Log-probabilities of up to kLanes columns of a row, -inf in the lanes that are not of it.
struct Lanes {
  f32 v[U];
};

static inline Lanes log_probs(const Row& row, Norm norm, int64_t start, int n) {
  float buffer[kChunk];  // more than n, which the compiler does not see
  const float* x = read(row, start, n, buffer);
  Lanes a;
  for (int u = 0; u < U; ++u)
    a.v[u] = u * W < n ? load(x + u * W, n - u * W, -kInf) - norm.max - norm.log_sum : set(-kInf);
  return a;
}

// Columns [start, start + n) of all rows through logarithms: the largest log-probability, the sum of the exponentials
// relative to it, and the log of the mean probability.
struct LogMean {
  Lanes top, sum, value;
};

static inline bool any(const Lanes& x, const Lanes& where) {  // is x > -inf (or NaN) anywhere that `where` is not 0
  f32 found = {};
  for (int u = 0; u < U; ++u) found += (x.v[u] == -kInf) | (where.v[u] == 0.0f) ? f32{} : set(1.0f);
  return sum_lanes(found) != 0.0f;
}

static inline Lanes largest(const Rows& rows, int64_t start, int n) {
  Lanes top = log_probs(rows.row[0], rows.norm[0], start, n);
  for (int64_t i = 1; i < rows.count; ++i) {
    const Lanes a = log_probs(rows.row[i], rows.norm[i], start, n);
    for (int u = 0; u < U; ++u) top.v[u] = max(a.v[u], top.v[u]);
  }
  return top;
}

// e^(a - top) of one row; 0 where every row has none.
static inline Lanes relative(const Rows& rows, int64_t i, const Lanes& top, int64_t start, int n) {
  Lanes e = log_probs(rows.row[i], rows.norm[i], start, n);
  for (int u = 0; u < U; ++u) e.v[u] = top.v[u] == -kInf ? f32{} : exp_nonpos(e.v[u] - top.v[u]);
  return e;
}

static inline LogMean log_mean(const Rows& rows, const Lanes& top, int64_t start, int n) {
  LogMean mean{top, {}, {}};
  for (int64_t i = 0; i < rows.count; ++i) {
    const Lanes e = relative(rows, i, top, start, n);
    for (int u = 0; u < U; ++u) mean.sum.v[u] += e.v[u];
  }
  const float log_count = static_cast<float>(::log(static_cast<double>(rows.count)));
  for (int u = 0; u < U; ++u)
    mean.value.v[u] = mean.sum.v[u] == 0.0f ? set(-kInf) : top.v[u] + (log_normal(mean.sum.v[u]) - log_count);
  return mean;
}

// 1 in the lanes of mass[0..n) that are too small, 0 elsewhere. A NaN is not too small.
static inline Lanes tiny_lanes(const float* mass, int n) {
  Lanes tiny;
  for (int u = 0; u < U; ++u)
    tiny.v[u] = u * W >= n ? f32{} : load(mass + u * W, n - u * W, 1.0f) < kTiny ? set(1.0f) : f32{};
  return tiny;
}

// Positions are dealt out in runs; neighbouring tasks are far apart in memory, so that threads which fault in a fresh
// gradient do not meet on its pages.
struct Runs {
  int64_t positions, length, tasks, threads;

  Runs(int64_t total, int64_t run, int workers)
      : positions(total), length(run), tasks(ceil_div(total, run)), threads(workers < 1 ? 1 : workers) {}
  int64_t first(int64_t task) const {
    const int64_t share = tasks / threads, dealt = share * threads;  // the last few as they come
    const int64_t run = task < dealt ? task % threads * share + task / threads : task;
    return run * length;
  }
  int64_t end(int64_t first) const { return first + length < positions ? first + length : positions; }
};

// Elements of the pieces that a row is cut into, `most` or up to a quarter more, so that none is a mere rest.
static inline int64_t even_piece(int64_t S, int64_t most) {
  const int64_t pieces = S <= most + most / 4 ? 1 : ceil_div(S - most / 4, most);
  return padded(ceil_div(S, pieces));
}

// Asks for a row that is read soon, or its first few KiB: the processor sees the rest coming.
static inline void prefetch(const Logits& x, int64_t S, int64_t b, int64_t l, int64_t d) {
  constexpr int64_t kMost = 8192;
  const int64_t offset = b * x.stride_b + l * x.stride_l + d * x.stride_d, bytes = row_bytes(x.dtype, S);
  const char* row = static_cast<const char*>(x.data) + offset * (x.dtype == kFloat32 || x.dtype == kLogistic ? 4 : 2);
  for (int64_t i = 0; i < bytes && i < kMost; i += 64) __builtin_prefetch(row + i);
}

// A few successive positions are read latent by latent, since a latent's rows of them lie side by side in memory: how
// many, so that the probabilities of all their rows stay in the cache; 1 where those of one do not.
static inline int64_t group_of(int64_t L, int64_t S) {
  const int64_t n = kGroupBytes / (L * padded(S) * 4);
  return n < 1 ? 1 : n < kPositions ? n : kPositions;
}

}  // namespace di4c::cpu::DI4C_ISA
