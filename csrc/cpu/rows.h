// Rows of logits in memory, and what every kernel asks of a row: its maximum and the log of its sum of exponentials.
#pragma once
#include "di4c/api.h"
#include "logistic.h"
#include "pool.h"
#include "vec.h"

namespace di4c::cpu::DI4C_ISA {

static inline int min_int(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

// The S logits of one row: S classes starting at `data`, any alignment that the dtype itself allows; or computed from
// the two floats there.
struct Row {
  const void* data;
  DType dtype;
  int64_t S;
  LogisticRow logistic;  // kLogistic only
};

static inline Row row_at(const Logits& x, int64_t S, int64_t b, int64_t l, int64_t d) {
  const int64_t offset = b * x.stride_b + l * x.stride_l + d * x.stride_d;
  const int64_t size = x.dtype == kFloat32 || x.dtype == kLogistic ? 4 : 2;
  Row row{};
  row.data = static_cast<const char*>(x.data) + offset * size;
  row.dtype = x.dtype;
  row.S = S;
  if (x.dtype == kLogistic) {
    const float* numbers = static_cast<const float*>(row.data);
    row.logistic = logistic_row(numbers[0], numbers[1], S);
  }
  return row;
}

// Elements [start, start + n) as floats: in place where they are floats, otherwise converted or computed into `buffer`,
// which holds n rounded up to W.
static inline const float* read(const Row& row, int64_t start, int n, float* buffer) {
  if (row.dtype == kFloat32) return static_cast<const float*>(row.data) + start;
  if (row.dtype == kLogistic) {
    logistic_logits(row.logistic, start, n, buffer);
    return buffer;
  }
  const uint16_t* source = static_cast<const uint16_t*>(row.data) + start;
  const auto convert = [&](auto widen) {
    int i = 0;
    u16 v = {};
    for (; i + W <= n; i += W) {
      memcpy(&v, source + i, sizeof v);
      store(buffer + i, widen(v));
    }
    if (i < n) {
      memcpy(&v, source + i, static_cast<size_t>(n - i) * 2);
      store(buffer + i, widen(v));
    }
  };
  if (row.dtype == kBFloat16)
    convert([](u16 v) { return from_bfloat16(v); });
  else
    convert([](u16 v) { return from_float16(v); });
  return buffer;
}

// What is read some time from now. Its lines are asked for one by one among the arithmetic that goes before: all asked
// for at once, they wait for each other and the arithmetic for them.
struct Soon {
  static constexpr char kNothing[64] = {};
  uintptr_t address = reinterpret_cast<uintptr_t>(kNothing);
  int size = 0;  // bytes of an element

  // Asks for the line in which a vector that begins with element i ends.
  void operator()(int64_t i) const {
    __builtin_prefetch(reinterpret_cast<const void*>(address + static_cast<uintptr_t>((i + W - 1) * size)));
  }
};

static inline int element_size(DType dtype) { return dtype == kLogistic ? 0 : dtype == kFloat32 ? 4 : 2; }

// A row from element `start` on, or what lies there in memory.
static inline Soon soon(const Row& row, int64_t start) {
  const int size = element_size(row.dtype);
  return {reinterpret_cast<uintptr_t>(row.data) + static_cast<uintptr_t>(start * size), size};
}

static inline float read_one(const Row& row, int64_t i) {
  if (row.dtype == kFloat32) return static_cast<const float*>(row.data)[i];
  float buffer[W];
  return read(row, i, 1, buffer)[0];
}

// The same row with its logits computed once and for all, into `room` of S rounded up to W floats, where they otherwise
// would be at each reading. Keep the old row for its pull.
static inline Row computed(const Row& row, float* room) {
  if (row.dtype != kLogistic) return row;
  logistic_logits(row.logistic, 0, static_cast<int>(row.S), room);
  Row floats{};
  floats.data = room;
  floats.dtype = kFloat32;
  floats.S = row.S;
  return floats;
}

static inline void logistic_pull(const Row& row, int64_t start, int n, const float* g, LogisticSum& sum) {
  logistic_pull(row.logistic, start, n, g, sum);
}

// Where a piece of gradient row [start, start + n) is to be computed: its place in `grad` (floats) or `buffer`.
static inline float* write_target(void* grad, DType dtype, int64_t start, float* buffer) {
  return dtype == kFloat32 ? static_cast<float*>(grad) + start : buffer;
}

// Rounds the piece computed in `buffer` into `grad`, where it is not floats and so already there.
static inline void write(void* grad, DType dtype, int64_t start, int n, const float* buffer) {
  if (dtype == kFloat32) return;
  uint16_t* target = static_cast<uint16_t*>(grad) + start;
  const auto round = [&](auto narrow) {
    int i = 0;
    for (; i + W <= n; i += W) {
      const u16 v = narrow(load(buffer + i));
      memcpy(target + i, &v, sizeof v);
    }
    if (i == n) return;
    const u16 v = narrow(load(buffer + i, n - i, 0.0f));
    memcpy(target + i, &v, static_cast<size_t>(n - i) * 2);
  };
  if (dtype == kBFloat16)
    round([](f32 x) { return to_bfloat16(x); });
  else
    round([](f32 x) { return to_float16(x); });
}

// Bytes of a row of gradient, or of logits that lie dense; the gradient of a logistic row is two floats.
static inline int64_t row_bytes(DType dtype, int64_t S) {
  return dtype == kLogistic ? 8 : S * (dtype == kFloat32 ? 4 : 2);
}

static inline char* grad_row(void* grad, DType dtype, int64_t row, int64_t S) {
  return static_cast<char*>(grad) + row * row_bytes(dtype, S);
}

static inline void zero_row(void* grad, DType dtype, int64_t row, int64_t S) {
  memset(grad_row(grad, dtype, row, S), 0, static_cast<size_t>(row_bytes(dtype, S)));
}

// f(u, i, count, x) for the vectors of x[0..n): u their place in the block of kLanes, i their first element, count >= W
// or, for the last, how many of its lanes are of the row; the others hold `fill`. Pass f as DI4C_EACH {...}.
#define DI4C_EACH(...) [&](__VA_ARGS__) __attribute__((always_inline))
template <typename F>
static inline __attribute__((always_inline)) void each(const float* x, int n, float fill, const F& f) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) f(u, i + u * W, W, load(x + i + u * W));
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u, i += W)
    if (i < n) f(u, i, n - i, load(x + i, n - i, fill));
}

static inline float max_of(const float* x, int n) {
  f32 m[U];
  for (int u = 0; u < U; ++u) m[u] = set(-kInf);
  each(x, n, -kInf, DI4C_EACH(int u, int, int, f32 v) { m[u] = max(v, m[u]); });
  return max_block(m);
}

// Reads a piece and finds its maximum on the way; `x` is left pointing at its floats. Not for logistic rows.
static inline float read_max(const Row& row, int64_t start, int n, float* buffer, const float*& x) {
  x = row.dtype == kFloat32 ? static_cast<const float*>(row.data) + start : buffer;
  if (row.dtype == kFloat32) return max_of(x, n);
  const uint16_t* source = static_cast<const uint16_t*>(row.data) + start;
  f32 m[U];
  for (int u = 0; u < U; ++u) m[u] = set(-kInf);
  const auto convert = [&](auto widen) __attribute__((always_inline)) {
    u16 v;
    int i = 0;
    for (; i + kLanes <= n; i += kLanes)
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        memcpy(&v, source + i + u * W, sizeof v);
        const f32 wide = widen(v);
        store(buffer + i + u * W, wide);
        m[u] = max(wide, m[u]);
      }
    for (int u = 0; i < n; ++u, i += W) {
      v = u16{};
      memcpy(&v, source + i, static_cast<size_t>(n - i < W ? n - i : W) * 2);
      store(buffer + i, widen(v));
      m[u] = max(load(buffer + i, n - i, -kInf), m[u]);
    }
  };
  if (row.dtype == kBFloat16)
    convert([](u16 v) { return from_bfloat16(v); });
  else
    convert([](u16 v) { return from_float16(v); });
  return max_block(m);
}

struct AskNothing {
  void operator()(int64_t) const {}
};

// sum exp(x - m), NaN where any x is. With m = -inf (every x is -inf, or NaN passed the maximum by) it is 0 or NaN.
// `ask`: see Soon.
template <typename Ask = AskNothing>
static inline float sum_exp(const float* x, int n, float m, Ask ask = {}) {
  const f32 shift = set(m == -kInf ? 0.0f : m);
  f32 s[U] = {};
  each(x, n, -kInf, DI4C_EACH(int u, int i, int, f32 v) {
    ask(i);
    s[u] += exp_nonpos(v - shift);
  });
  return sum_block(s);
}

// A row's normaliser in two parts, log sum exp x = max + log_sum: x - max is exact where it matters, so that a shift of
// all logits costs nothing. NaN in log_sum where the row is bad: it holds a NaN or +inf, or is -inf throughout.
struct Norm {
  float max, log_sum;
};

struct ExactNorm {  // before log_sum is rounded
  float max;
  double log_sum;
  operator Norm() const { return {max, static_cast<float>(log_sum)}; }
};

// Row i's place in the two planes of api.h; `rows` is the size of a plane.
static inline void keep(const Norm& norm, float* planes, int64_t rows, int64_t i) {
  planes[i] = norm.max;
  planes[rows + i] = norm.log_sum;
}

static inline Norm kept(const float* planes, int64_t rows, int64_t i) { return {planes[i], planes[rows + i]}; }

static inline ExactNorm norm_of(const Row& row, float* buffer) {
  float top = -kInf;
  double sum = 0;
  for (int64_t start = 0; start < row.S; start += kChunk) {
    const int n = min_int(row.S - start, kChunk);
    const float* x = read(row, start, n, buffer);
    const float m = max_of(x, n), s = sum_exp(x, n, m);
    if (start == 0) {
      sum = s;
      top = m;
    } else if (m > top) {
      sum = (sum == 0 ? 0 : sum * ::exp(static_cast<double>(top) - m)) + s;
      top = m;
    } else {
      sum += s == 0 ? 0 : s * ::exp(static_cast<double>(m) - top);
    }
  }
  return {top, sum > 0 ? ::log(sum) : __builtin_nan("")};
}

// f(i, scratch) for i in [0, tasks). `elements` is what all tasks read together: threads are woken for enough only.
template <typename F>
static inline void parallel(int64_t tasks, int threads, int64_t elements, size_t scratch_bytes, const F& f) {
  constexpr int64_t kPerThread = 1 << 14;
  run(tasks, min_int(threads, 1 + elements / kPerThread), scratch_bytes,
      [](void* context, int64_t i, void* scratch) { (*static_cast<const F*>(context))(i, scratch); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

static inline float weight_at(const float* weight, int64_t i) { return weight ? weight[i] : 1.0f; }

}  // namespace di4c::cpu::DI4C_ISA
