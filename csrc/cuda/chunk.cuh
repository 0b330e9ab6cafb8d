// Chunks of kChunk classes, a warp to each: their maximum and mass, and drawing a class of one (masses.h).
#pragma once
#include "di4c/masses.h"
#include "group.cuh"
#include "row.cuh"

namespace di4c::cuda {

constexpr int kPerLane = kChunk / kWarp;  // classes of a chunk to a lane

// Index of the first lane whose inclusive prefix exceeds r. There is one where r is below the total.
__device__ __forceinline__ int first_above(uint64_t prefix, uint64_t r) {
  return __ffs(static_cast<int>(__ballot_sync(kFullWarp, r < prefix))) - 1;
}

struct ChunkStats {
  float max, sum;  // sum of exp(x - max); NaN if the chunk holds one, 0 if it is all -inf, 1 if max is +inf
};

// A row as the sampler sees it: tempered, one class excluded.
template <int kDType>
struct SampledRow {
  Row<kDType> row;
  int64_t S, excluded;
  float inverse_temperature;

  __device__ __forceinline__ SampledRow(const SampleArgs& a, int64_t b, int64_t d)
      : row(a.logits, b, 0, d),
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
    const int64_t begin = chunk * kChunk;
    const int count = static_cast<int>(S - begin < kChunk ? S - begin : kChunk);
    const int head = static_cast<int>(classes_before_boundary(row.data + begin, count));
    const int vectors = (count - head) / kVector, loose = count - vectors * kVector;

    float x[kPerLane + 1];
#pragma unroll
    for (int j = 0; j < kPerLane / kVector; ++j) {
      const int vector = lane + j * kWarp;
      const int64_t s = begin + head + vector * kVector;
      float v[kVector];
      if (vector < vectors) row.load(s, v);
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[j * kVector + i] = vector < vectors ? shaped(v[i], s + i) : -INFINITY;
    }
    const int64_t s = begin + (lane < head ? lane : lane + vectors * kVector);
    x[kPerLane] = lane < loose ? at(s) : -INFINITY;

    float top = x[0];
#pragma unroll
    for (int i = 1; i <= kPerLane; ++i) top = fmaxf(top, x[i]);
    top = warp_max(top);
    const bool infinite = fabsf(top) == INFINITY;  // then the differences would be NaN
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i <= kPerLane; ++i) sum += infinite ? (x[i] == x[i] ? 0.0f : NAN) : exp_nonpos(x[i] - top);
    sum = warp_sum(sum);
    if (infinite && top > 0.0f) sum += 1.0f;
    return {top, sum};
  }

  // Masses of the lanes' kPerLane consecutive classes of a chunk, summed up to and with each lane.
  __device__ __forceinline__ uint64_t mass_prefix(int64_t chunk, float top, int lane) const {
    const int64_t begin = chunk * kChunk + lane * kPerLane;
    uint64_t mass = 0;
    for (int j = 0; j < kPerLane; j += kVector) {
      float v[kVector];
      if (begin + j + kVector <= S) {
        row.load(begin + j, v);
#pragma unroll
        for (int i = 0; i < kVector; ++i) mass += class_mass(shaped(v[i], begin + j + i), top);
      } else {
        for (int i = 0; i < kVector; ++i) mass += class_mass(at(begin + j + i), top);
      }
    }
    return warp_prefix(mass, lane);
  }

  // The class that the second 64 bits choose, by the prefix above: a lane first, then one of its classes.
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
};
static_assert(kPerLane == kWarp, "pick_class gives each lane one class of the owner's");

}  // namespace di4c::cuda
