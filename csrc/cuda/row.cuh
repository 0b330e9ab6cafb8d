// Rows of classes: reading them as float and writing gradients, whatever the dtype and the alignment.
//
// The body of a row moves in vectors of kVector classes, 16 bytes at a time; `sweep` peels the classes before
// the first 16-byte boundary and after the last whole vector, so that odd S costs no more than even S.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "di4c/api.h"
#include "di4c/logistic.h"

namespace di4c::cuda {

constexpr int kVector = 8, kHalf = 4;

template <int kDType>
struct Element;

template <>
struct Element<kFloat32> {
  using Type = float;
  static __device__ __forceinline__ float widen(float v) { return v; }
  static __device__ __forceinline__ float narrow(float v) { return v; }
};

template <>
struct Element<kBFloat16> {
  using Type = __nv_bfloat16;
  static __device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
  static __device__ __forceinline__ __nv_bfloat16 narrow(float v) { return __float2bfloat16_rn(v); }
};

template <>
struct Element<kFloat16> {
  using Type = __half;
  static __device__ __forceinline__ float widen(__half v) { return __half2float(v); }
  static __device__ __forceinline__ __half narrow(float v) { return __float2half_rn(v); }
};

__device__ __forceinline__ bool on_vector_boundary(const void* p) {
  return (reinterpret_cast<uintptr_t>(p) & 15) == 0;
}

// Classes before the first 16-byte boundary of a row; never more than the row has.
template <class T>
__device__ __forceinline__ int64_t classes_before_boundary(const T* row, int64_t S) {
  const int64_t head = (16 - (reinterpret_cast<uintptr_t>(row) & 15)) % 16 / sizeof(T);
  return head < S ? head : S;
}

__device__ __forceinline__ int64_t row_offset(const Logits& x, int64_t b, int64_t l, int64_t d) {
  return b * x.stride_b + l * x.stride_l + d * x.stride_d;
}

// The weight of a position; no weights at all mean 1.
__device__ __forceinline__ float weight_at(const float* weight, int64_t b, int64_t D, int64_t d) {
  return weight == nullptr ? 1.0f : weight[b * D + d];
}

// A row of logits whose dtype is known when compiled.
template <int kDType>
struct Row {
  using T = typename Element<kDType>::Type;
  static constexpr int kWords = kVector * sizeof(T) / 16;  // 16-byte words to a vector

  const T* data;

  __device__ __forceinline__ explicit Row(const void* row) : data(static_cast<const T*>(row)) {}

  __device__ __forceinline__ Row(const Logits& x, int64_t b, int64_t l, int64_t d)
      : data(static_cast<const T*>(x.data) + row_offset(x, b, l, d)) {}

  __device__ __forceinline__ float operator[](int64_t s) const { return Element<kDType>::widen(data[s]); }

  __device__ __forceinline__ int64_t head(int64_t S) const { return classes_before_boundary(data, S); }

  // kN classes from s on: a whole vector, half of one, or one class.
  template <int kN>
  __device__ __forceinline__ void load(int64_t s, float (&x)[kN]) const {
    static_assert(kN == 1 || kN == kHalf || kN == kVector, "a row is read by classes or by vectors");
    using Word = std::conditional_t<kN * sizeof(T) % 16 == 0, uint4, uint64_t>;
    if (kN > 1 && (reinterpret_cast<uintptr_t>(data + s) & (sizeof(Word) - 1)) == 0) {
      constexpr int kCount = kN * sizeof(T) < sizeof(Word) ? 1 : kN * sizeof(T) / sizeof(Word);
      Word words[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) words[i] = reinterpret_cast<const Word*>(data + s)[i];
      T values[kN];
      memcpy(values, words, sizeof values);
#pragma unroll
      for (int i = 0; i < kN; ++i) x[i] = Element<kDType>::widen(values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kN; ++i) x[i] = Element<kDType>::widen(data[s + i]);
    }
  }
};

// A logistic row: its two floats are read once, its S logits computed where they are asked for.
template <>
struct Row<kLogistic> {
  LogisticRow numbers;

  __device__ __forceinline__ Row(const Logits& x, int64_t S, int64_t b, int64_t l, int64_t d) {
    const float* data = static_cast<const float*>(x.data) + row_offset(x, b, l, d);
    numbers = logistic_row(data[0], data[1], S);
  }

  __device__ __forceinline__ float operator[](int64_t s) const { return logistic_logit(numbers, s); }

  __device__ __forceinline__ int64_t head(int64_t) const { return 0; }

  template <int kN>
  __device__ __forceinline__ void load(int64_t s, float (&x)[kN]) const {
#pragma unroll
    for (int i = 0; i < kN; ++i) x[i] = logistic_logit(numbers, s + i);
  }
};

// Row (b, l, d) of S logits, however they lie.
template <int kDType>
__device__ __forceinline__ Row<kDType> row_at(const Logits& x, int64_t S, int64_t b, int64_t l, int64_t d) {
  if constexpr (kDType == kLogistic) {
    return Row<kDType>(x, S, b, l, d);
  } else {
    return Row<kDType>(x, b, l, d);
  }
}

// A row in memory whose dtype is known only when run: for targets, whose dtype need not be the logits'. The branch is
// the same for every thread.
struct AnyRow {
  const void* data;
  DType dtype;

  __device__ __forceinline__ AnyRow(const Logits& x, int64_t b, int64_t l, int64_t d)
      : data(static_cast<const char*>(x.data) + row_offset(x, b, l, d) * (x.dtype == kFloat32 ? 4 : 2)),
        dtype(x.dtype) {}

  __device__ __forceinline__ float operator[](int64_t s) const {
    float v[1];
    load(s, v);
    return v[0];
  }

  // f(the row as one of its dtype): one branch for much work.
  template <class F>
  __device__ __forceinline__ void typed(F f) const {
    switch (dtype) {
      case kFloat32: return f(Row<kFloat32>(data));
      case kBFloat16: return f(Row<kBFloat16>(data));
      default: return f(Row<kFloat16>(data));
    }
  }

  template <int kN>
  __device__ __forceinline__ void load(int64_t s, float (&v)[kN]) const {
    typed([&](const auto& row) { row.load(s, v); });
  }
};

// A row of the gradient: (B, L, D, S) contiguous, in the logits' dtype.
template <int kDType>
struct GradRow {
  using T = typename Element<kDType>::Type;
  static constexpr int kWords = Row<kDType>::kWords;

  T* data;

  // Row `row` of the gradient, or what follows its class `begin`.
  __device__ __forceinline__ GradRow(void* grad, int64_t row, int64_t S, int64_t begin = 0)
      : data(static_cast<T*>(grad) + row * S + begin) {}

  __device__ __forceinline__ int64_t head(int64_t S) const { return classes_before_boundary(data, S); }

  __device__ __forceinline__ float operator[](int64_t s) const { return Element<kDType>::widen(data[s]); }

  __device__ __forceinline__ void set(int64_t s, float v) const { data[s] = Element<kDType>::narrow(v); }

  template <int kN>
  __device__ __forceinline__ void store(int64_t s, const float (&x)[kN]) const {
    if (kN == kVector && on_vector_boundary(data + s)) {
      T values[kVector];
#pragma unroll
      for (int i = 0; i < kN; ++i) values[i] = Element<kDType>::narrow(x[i]);
      uint4 words[kWords];
      memcpy(words, values, sizeof words);
#pragma unroll
      for (int i = 0; i < kWords; ++i) reinterpret_cast<uint4*>(data + s)[i] = words[i];
    } else {
#pragma unroll
      for (int i = 0; i < kN; ++i) set(s + i, x[i]);
    }
  }
};

// How many classes one step of a sweep covers, as a type, so that arrays of it live in registers.
template <int kN>
struct Width {
  static constexpr int value = kN;
};

// Covers the classes [0, S) once, by `size` threads of which this is `rank`: step(s, Width<n>) takes the n
// classes from s on. The vectors lie on the 16-byte boundaries of a row with `head` classes before the first.
template <class Step>
__device__ __forceinline__ void sweep(int64_t head, int64_t S, int rank, int size, Step step) {
  const int64_t vectors = (S - head) / kVector, tail = head + vectors * kVector;
  if (rank < head) step(int64_t{rank}, Width<1>());
  for (int64_t v = rank; v < vectors; v += size) step(head + v * kVector, Width<kVector>());
  if (tail + rank < S) step(tail + rank, Width<1>());
}

}  // namespace di4c::cuda
