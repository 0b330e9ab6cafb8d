// Chunks of kChunk classes, a warp to each: their maximum and mass, and drawing a class of one (masses.h).
#pragma once
#include "di4c/masses.h"
#include "group.cuh"
#include "stream.cuh"

namespace di4c::cuda {

constexpr int kPerLane = kChunk / kWarp;  // classes of a chunk to a lane

// Index of the first lane whose inclusive prefix exceeds r. There is one where r is below the total.
__device__ __forceinline__ int first_above(uint64_t prefix, uint64_t r) {
  return __ffs(static_cast<int>(__ballot_sync(kFullWarp, r < prefix))) - 1;
}

struct ChunkStats {
  float max, sum;  // sum of exp(x - max); NaN if the chunk holds one, 0 if it is all -inf, 1 if max is +inf
};

// Lane j receives the sum over all lanes of their j-th value, where value(j) gives a lane's own. In every step lanes
// exchange halves, so that 31 exchanges do what 32 sums over a warp would take 160 for.
template <class F>
__device__ __forceinline__ uint64_t sums_by_lane(int lane, F value) {
  constexpr int kHalf = kWarp / 2;
  uint64_t v[kHalf];
#pragma unroll
  for (int j = 0; j < kHalf; ++j) {
    const uint64_t low = value(j), high = value(j + kHalf);
    v[j] = (lane & kHalf ? high : low) + __shfl_xor_sync(kFullWarp, lane & kHalf ? low : high, kHalf);
  }
#pragma unroll
  for (int step = kHalf / 2; step > 0; step /= 2) {
#pragma unroll
    for (int j = 0; j < step; ++j) {
      const uint64_t low = v[j], high = v[j + step];
      v[j] = (lane & step ? high : low) + __shfl_xor_sync(kFullWarp, lane & step ? low : high, step);
    }
  }
  return v[0];
}

// A row as the sampler sees it: tempered, one class excluded.
template <int kDType>
struct SampledRow {
  Row<kDType> row;
  int64_t S, excluded;
  float inverse_temperature;

  __device__ __forceinline__ SampledRow(const SampleArgs& a, int64_t b, int64_t d)
      : row(row_at<kDType>(a.logits, a.S, b, 0, d)),
        S(a.S),
        excluded(a.mask_id),
        inverse_temperature(a.temperature > 0.0f ? 1.0f / a.temperature : 1.0f) {}

  __device__ __forceinline__ float shaped(float x, int64_t s) const {
    return s == excluded ? -INFINITY : __fmul_rn(x, inverse_temperature);
  }

  // Class s, or -inf where the row has no such class.
  __device__ __forceinline__ float at(int64_t s) const { return s < S ? shaped(row[s], s) : -INFINITY; }

  // The chunk's classes dealt to the lanes for coalesced reading: vectors between 16-byte boundaries, then the
  // classes before the first and after the last. Which lane holds which class is of no matter to the sum.
  __device__ __forceinline__ ChunkStats stats(int64_t chunk, int lane) const {
    constexpr int kRounds = kPerLane / kVector;
    const int64_t begin = chunk * kChunk;
    const int count = static_cast<int>(S - begin < kChunk ? S - begin : kChunk);
    int head = 0;
    if constexpr (kDType != kLogistic) head = static_cast<int>(classes_before_boundary(row.data + begin, count));
    const int vectors = (count - head) / kVector, loose = count - vectors * kVector;

    float x[kPerLane];
#pragma unroll
    for (int j = 0; j < kRounds; ++j) {
      const int vector = lane + j * kWarp;
      const int64_t s = begin + head + vector * kVector;
      float v[kVector];
      if (vector < vectors) load_vector(s, v);
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[j * kVector + i] = vector < vectors ? shaped(v[i], s + i) : -INFINITY;
    }
    const float rest = lane < loose ? at(begin + (lane < head ? lane : lane + vectors * kVector)) : -INFINITY;

    float top = rest;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) top = fmaxf(top, x[i]);
    top = warp_max(top);
    const bool infinite = fabsf(top) == INFINITY;  // then the differences would be NaN
    const auto term = [&](float v) { return infinite ? (v == v ? 0.0f : NAN) : exp_nonpos(v - top); };
    float sum = term(rest);
#pragma unroll
    for (int j = 0; j < kRounds; ++j) {
      if (j * kWarp >= vectors) break;  // the same for all lanes: short rows take few exponentials
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += term(x[j * kVector + i]);
    }
    sum = warp_sum(sum);
    if (infinite && top > 0.0f) sum += 1.0f;
    return {top, sum};
  }

  // Masses of a chunk's classes 32 by 32, summed up to and with the 32 that bear the lane's number.
  __device__ __forceinline__ uint64_t mass_prefix(int64_t chunk, float top, int lane) const {
    const int64_t begin = chunk * kChunk;
    const auto mass = [&](int j) {
      const int64_t s = begin + j * kWarp;
      return s < S ? class_mass(at(s + lane), top) : 0;
    };
    return warp_prefix(sums_by_lane(lane, mass), lane);
  }

  // The class that the second 64 bits choose, by the prefix above: first 32 classes, then one of them.
  __device__ __forceinline__ int64_t pick_class(int64_t chunk, float top, uint64_t prefix, uint64_t bits,
                                                int lane) const {
    const uint64_t r = below(bits, __shfl_sync(kFullWarp, prefix, kWarp - 1));
    const int owner = first_above(prefix, r);
    const uint64_t before = __shfl_sync(kFullWarp, prefix, owner > 0 ? owner - 1 : 0);
    const int64_t begin = chunk * kChunk + owner * kPerLane;
    const uint64_t fine = warp_prefix(class_mass(at(begin + lane), top), lane);
    return begin + first_above(fine, owner > 0 ? r - before : r);
  }

  // The first class of a chunk that equals `wanted`, which the chunk holds.
  __device__ __forceinline__ int64_t first_equal(int64_t chunk, float wanted, int lane) const {
    for (int64_t begin = chunk * kChunk; begin < S; begin += kWarp) {
      const unsigned hits = __ballot_sync(kFullWarp, at(begin + lane) == wanted);
      if (hits != 0) return begin + __ffs(static_cast<int>(hits)) - 1;
    }
    return kBadRow;
  }

 private:
  // A vector on a 16-byte boundary, where the row lies in memory.
  __device__ __forceinline__ void load_vector(int64_t s, float (&v)[kVector]) const {
    if constexpr (kDType == kLogistic) {
      row.load(s, v);
    } else {
      Words<kDType>::on_boundary(row.data + s).widen(v);
    }
  }
};
static_assert(kPerLane == kWarp, "a chunk is 32 times 32 classes");

}  // namespace di4c::cuda
