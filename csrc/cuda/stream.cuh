// Reading rows at the speed of memory: whole vectors on 16-byte boundaries, several on their way before the first is
// used, and what a second sweep needs kept in shared memory.
#pragma once
#include <type_traits>

#include "online.cuh"
#include "team.cuh"

namespace di4c::cuda {

// kVector classes as they lie in memory.
template <int kDType>
struct Words {
  using T = typename Row<kDType>::T;
  static constexpr int kCount = Row<kDType>::kWords;

  uint4 word[kCount];

  static __device__ __forceinline__ Words on_boundary(const T* p) {
    Words w;
#pragma unroll
    for (int i = 0; i < kCount; ++i) w.word[i] = reinterpret_cast<const uint4*>(p)[i];
    return w;
  }

  static __device__ __forceinline__ Words anywhere(const T* p) {
    if (on_vector_boundary(p)) return on_boundary(p);
    T values[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = p[i];
    Words w;
    memcpy(w.word, values, sizeof values);
    return w;
  }

  __device__ __forceinline__ void widen(float (&x)[kVector]) const {
    T values[kVector];
    memcpy(values, word, sizeof values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = Element<kDType>::widen(values[i]);
  }
};

// The running log-sum-exp of the classes [begin, begin + n) of a row, in every thread of the group.
template <int kDType>
__device__ __forceinline__ Online slice_online(const Row<kDType>& row, int64_t begin, int64_t n, const Group& group) {
  constexpr int kAhead = 16 / (Words<kDType>::kCount * 4);  // 64 bytes of a thread on their way
  const auto* data = row.data + begin;
  const int64_t head = classes_before_boundary(data, n), vectors = (n - head) / kVector;
  const int64_t tail = head + vectors * kVector;
  Online mine;
  if (group.rank < head) mine.add(Element<kDType>::widen(data[group.rank]));
  int64_t v = group.rank;
  for (; v + (kAhead - 1) * group.size < vectors; v += kAhead * group.size) {
    Words<kDType> words[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      words[i] = Words<kDType>::on_boundary(data + head + (v + i * group.size) * kVector);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      float x[kVector];
      words[i].widen(x);
      mine.add(x);
    }
  }
  for (; v < vectors; v += group.size) {
    float x[kVector];
    Words<kDType>::on_boundary(data + head + v * kVector).widen(x);
    mine.add(x);
  }
  if (tail + group.rank < n) mine.add(Element<kDType>::widen(data[tail + group.rank]));
  return mine.merged(group);
}

// The normaliser of a row whose parts left max and sum at k and k + 1.
template <int kValues>
__device__ __forceinline__ Norm norm_of_parts(const Team<kValues>& team, int k) {
  Online all;
  for (int part = 0; part < team.parts(); ++part) all.max = fmaxf(all.max, team.get(part, k));
  for (int part = 0; part < team.parts(); ++part)
    all.sum += team.get(part, k + 1) * exp_quick(team.get(part, k) - all.max);
  return norm_of(all);
}

// The first vectors that a thread read of a row, in shared memory for its second sweep; no other thread's business.
template <int kDType>
struct Stage {
  uint4* words;
  int kept, size;  // vectors kept, threads that keep them side by side

  __device__ __forceinline__ void put(int i, const Words<kDType>& w) const {
#pragma unroll
    for (int c = 0; c < Words<kDType>::kCount; ++c) words[(i * Words<kDType>::kCount + c) * size] = w.word[c];
  }

  __device__ __forceinline__ Words<kDType> get(int i) const {
    Words<kDType> w;
#pragma unroll
    for (int c = 0; c < Words<kDType>::kCount; ++c) w.word[c] = words[(i * Words<kDType>::kCount + c) * size];
    return w;
  }
};

// The classes [begin, begin + n) of a row and of its target, which two sweeps go through in the same order.
template <int kDType, class Target>
struct Pair {
  // A target of the row's dtype is kept beside it, another one read again.
  static constexpr bool kSame = std::is_same<Target, Row<kDType>>::value;

  const Row<kDType>& row;
  const Target& target;
  int64_t begin, n, head;

  __device__ __forceinline__ Pair(const Row<kDType>& row_, const Target& target_, int64_t begin_, int64_t n_)
      : row(row_), target(target_), begin(begin_), n(n_), head(classes_before_boundary(row_.data + begin_, n_)) {}

  // step(x, y) for each vector or class. The first sweep (kFirst) keeps what the second one finds.
  template <bool kFirst, class Step>
  __device__ __forceinline__ void sweep(const Group& group, const Stage<kDType>& x_stage,
                                        const Stage<kDType>& y_stage, Step step) const {
    const int64_t vectors = (n - head) / kVector, tail = head + vectors * kVector;
    if (group.rank < head) one(begin + group.rank, step);
    int i = 0;
    for (int64_t v = group.rank; v < vectors; v += group.size, ++i) {
      const int64_t s = begin + head + v * kVector;
      const bool kept = i < x_stage.kept;
      float x[kVector], y[kVector];
      Words<kDType> words;
      if constexpr (kSame) {
        Words<kDType> others;
        if (!kFirst && kept) {
          words = x_stage.get(i), others = y_stage.get(i);
        } else {
          words = Words<kDType>::on_boundary(row.data + s), others = Words<kDType>::anywhere(target.data + s);
        }
        if (kFirst && kept) x_stage.put(i, words), y_stage.put(i, others);
        others.widen(y);
      } else {
        words = Words<kDType>::on_boundary(row.data + s);
        target.load(s, y);
      }
      words.widen(x);
      step(x, y);
    }
    if (tail + group.rank < n) one(begin + tail + group.rank, step);
  }

 private:
  template <class Step>
  __device__ __forceinline__ void one(int64_t s, Step step) const {
    const float x[1] = {row[s]}, y[1] = {target[s]};
    step(x, y);
  }
};

}  // namespace di4c::cuda
