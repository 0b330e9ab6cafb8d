// What the mixture's kernels share: the components of one position, and how likely they make a class.
//
// With p_l = softmax of row l, mass(s) = sum_l p_l(s). A class so far down every component's tail that its mass is no
// good float keeps its shares p_l / mass through logarithms: mass = sum exp(top), top = max_l log p_l; else top is 0.
#pragma once
#include <stdexcept>
#include <string>
#include <type_traits>

#include "online.cuh"

namespace di4c::cuda {

constexpr int kComponents = 1024;     // the most that a mixture may have: what is kept of each lies in shared memory
constexpr int kShortComponents = kComponents * kWarp / kMaxThreads;  // where every warp has a position of its own
constexpr int64_t kShortStates = 512;
constexpr float kDeep = 1e-25f;       // masses below go through logarithms

__device__ __forceinline__ bool is_state(int64_t token, int64_t S) { return token >= 0 && token < S; }

// What the components make of kN classes at once: of a vector of a row, or of one class.
template <int kN>
struct Mass {
  float top[kN], sum[kN];
  float logs[kN];  // sum_l log p_l

  // log(mean_l p_l); -inf where no component has mass.
  __device__ __forceinline__ float log_mean(int i, float log_count) const {
    return sum[i] == 0.0f ? -INFINITY : top[i] + (logf(sum[i]) - log_count);
  }
};

// The `count` rows of an operand at one position, and their normalisers in planes (2, B, count, D). kDType: of the
// rows, or kAnyDType where only the run knows it.
constexpr int kAnyDType = -1;

template <int kDType>
struct Components {
  static constexpr int kRowsAhead = kDType == kLogistic ? 1 : 2;  // as registers allow

  const Logits& x;
  const float* lse;
  int64_t count, plane, first, D, S, b, d;

  __device__ __forceinline__ Components(const Logits& logits, const float* planes, int64_t B, int64_t rows, int64_t D_,
                                        int64_t states, int64_t b_, int64_t d_)
      : x(logits), lse(planes), count(rows), plane(B * rows * D_), first(b_ * rows * D_ + d_), D(D_), S(states), b(b_),
        d(d_) {}

  __device__ __forceinline__ auto row(int64_t l) const {
    if constexpr (kDType == kAnyDType) {
      return AnyRow(x, b, l, d);
    } else {
      return row_at<kDType>(x, S, b, l, d);
    }
  }

  __device__ __forceinline__ int64_t index(int64_t l) const { return first + l * D; }

  __device__ __forceinline__ Norm norm(int64_t l) const { return Norm::kept(lse, plane, index(l)); }

  // log p_l of kN classes from s on.
  template <int kN>
  __device__ __forceinline__ void log_prob(int64_t l, int64_t s, float (&v)[kN]) const {
    row(l).load(s, v);
    const Norm n = norm(l);
#pragma unroll
    for (int i = 0; i < kN; ++i) v[i] = n.log_prob(v[i]);
  }

  template <int kN>
  __device__ __forceinline__ void mass(int64_t s, Mass<kN>& mass) const {
#pragma unroll
    for (int i = 0; i < kN; ++i) mass.top[i] = mass.sum[i] = mass.logs[i] = 0.0f;
#pragma unroll kRowsAhead
    for (int l = 0; l < static_cast<int>(count); ++l) {
      float v[kN];
      log_prob(l, s, v);
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        mass.sum[i] += exp_quick(v[i]);
        mass.logs[i] += v[i];
      }
    }
    bool deep = false;
#pragma unroll
    for (int i = 0; i < kN; ++i) deep = deep || mass.sum[i] < kDeep;
    if (deep) through_logarithms(s, mass);
  }

 private:
  template <int kN>
  __device__ __forceinline__ void through_logarithms(int64_t s, Mass<kN>& mass) const {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      mass.top[i] = -FLT_MAX;
      mass.sum[i] = 0.0f;
    }
#pragma unroll 1
    for (int l = 0; l < static_cast<int>(count); ++l) {
      float v[kN];
      log_prob(l, s, v);
#pragma unroll
      for (int i = 0; i < kN; ++i) {  // one exponential a class: of the old maximum or of the new value
        const float gap = v[i] - mass.top[i], e = exp_quick(-fabsf(gap));
        mass.sum[i] = gap > 0.0f ? mass.sum[i] * e + 1.0f : mass.sum[i] + e;
        mass.top[i] = gap > 0.0f ? v[i] : mass.top[i];
      }
    }
  }
};

// A teacher's probabilities t, and their logarithms, for kN classes.
template <int kDType, int kN>
__device__ __forceinline__ void teacher_of(const Components<kDType>& teacher, int64_t s, float (&t)[kN],
                                           float (&log_t)[kN]) {
  teacher.log_prob(0, s, log_t);
#pragma unroll
  for (int i = 0; i < kN; ++i) t[i] = exp_quick(log_t[i]);
}

// The same of a target, the mean of its components.
template <int kDType, int kN>
__device__ __forceinline__ void target_of(const Components<kDType>& target, int64_t s, float (&t)[kN],
                                          float (&log_t)[kN]) {
  if (target.count == 1) return teacher_of(target, s, t, log_t);
  Mass<kN> mass;
  target.mass(s, mass);
  const float log_count = logf(static_cast<float>(target.count));
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    log_t[i] = mass.log_mean(i, log_count);
    t[i] = exp_quick(log_t[i]);
  }
}

// Logistic targets come with logistic logits only; all others are told apart when run.
template <int kDType>
using TargetComponents = Components<kDType == kLogistic ? kLogistic : kAnyDType>;

// A number of every class of a tile, for all of a team to read. A slot holds kN classes, kHalf or 1.
struct Field {
  struct alignas(16) Quad {
    float v[kHalf];
  };
  float* data;

  template <int kN>
  __device__ __forceinline__ void put(int slot, const float (&v)[kN]) const {
    if constexpr (kN == 1) {
      data[slot] = v[0];
    } else {
      reinterpret_cast<Quad*>(data)[slot] = {{v[0], v[1], v[2], v[3]}};
    }
  }

  template <int kN>
  __device__ __forceinline__ void get(int slot, float (&v)[kN]) const {
    if constexpr (kN == 1) {
      v[0] = data[slot];
    } else {
      const Quad quad = reinterpret_cast<const Quad*>(data)[slot];
#pragma unroll
      for (int i = 0; i < kN; ++i) v[i] = quad.v[i];
    }
  }
};

// Cuts a row's classes into vectors between 16-byte boundaries and `loose` single ones before and after. Logistic rows
// are nowhere in memory, and all loose: their code is long, and eight copies of it would be longer.
template <int kDType>
struct Cut {
  int64_t head, vectors, tail, loose;

  __device__ __forceinline__ Cut(int64_t head_, int64_t S)
      : head(head_), vectors(kDType == kLogistic ? 0 : (S - head_) / kVector), tail(head_ + vectors * kVector),
        loose(head_ + (S - tail)) {}

  __device__ __forceinline__ int64_t vector(int64_t v) const { return head + v * kVector; }
  __device__ __forceinline__ int64_t single(int64_t i) const { return i < head ? i : tail + (i - head); }
  // The first class of the vector that holds class s; s itself where none does.
  __device__ __forceinline__ int64_t start(int64_t s) const {
    return s < head || s >= tail ? s : s - (s - head) % kVector;
  }
};

inline void check_components(const char* op, int64_t L) {
  if (L <= kComponents) return;
  throw std::runtime_error(std::string("di4c: ") + op + " takes at most " + std::to_string(kComponents) +
                           " components on CUDA, got L = " + std::to_string(L));
}

// One warp to a position, eight to a CTA, where rows are short; else the CTA has one position.
inline dim3 mixture_block(int64_t S, int64_t L) {
  if (S <= kShortStates && L <= kShortComponents) return dim3(kWarp, kMaxThreads / kWarp);
  return dim3(S <= 1024 + kVector ? kMaxThreads / 2 : kMaxThreads);
}

}  // namespace di4c::cuda
