// Select and reveal (reveal.h), a CTA to each sequence.
//
// The orders of the candidates lie where their tokens will, and are counted there by their next 8 bits, once for each
// 8 bits that it takes to tell the last one revealed from the next: three or four times, eight where confidences tie.
// Counts are integers, so no order of the threads changes them.
#pragma once
#include "di4c/api.h"
#include "di4c/reveal.h"
#include "group.cuh"

namespace di4c::cuda {

struct RevealShared {
  unsigned count[kDigits];
  uint64_t known;  // the digits found so far, those below 0
  int64_t wanted;  // how many of the candidates that begin with them are revealed,
  int64_t found;   // and how many there are
};

struct Sequence {
  const RevealArgs& a;
  int64_t b, draw;

  __device__ __forceinline__ bool masked(int64_t d) const { return a.x_t[b * a.D + d] == a.mask_id; }
  __device__ __forceinline__ int64_t at(int64_t d) const { return (b * a.draws + draw) * a.D + d; }

  // Leaves a candidate's order in its place, and elsewhere what will be there.
  __device__ __forceinline__ void prepare(int64_t d) const {
    int64_t value = a.x_t[b * a.D + d];
    if (value == a.mask_id) {
      const Bits128 bits = philox(static_cast<uint64_t>(a.keys[b]), static_cast<uint64_t>(d),
                                  static_cast<uint32_t>(draw), stream_word(a.stream, kCoin));
      const uint32_t order =
          a.tokens[at(d)] < 0 ? 0 : confidence_order(a.log_prob[at(d)], a.noise[b], bits.a);
      value = order == 0 ? kBadToken : int64_t{order};
    }
    a.x_s[at(d)] = value;
  }

  // What prepare() left: a candidate's order, 0 for all else.
  __device__ __forceinline__ uint64_t order(int64_t d) const {
    if (!masked(d)) return 0;
    const int64_t value = a.x_s[at(d)];
    return value < 0 ? 0 : reveal_order(static_cast<uint32_t>(value), d);
  }
};

// One warp looks from the highest digit down for the one in which the last candidate revealed lies. `first`: nothing is
// known yet, and wanted is bounded by how many candidates there are.
__device__ __forceinline__ void next_digit(RevealShared& shared, int shift, bool first, int lane) {
  constexpr int kEach = kDigits / kWarp;
  const int highest = kDigits - 1 - lane * kEach;
  uint64_t mine = 0;
  for (int i = 0; i < kEach; ++i) mine += shared.count[highest - i];
  const uint64_t prefix = warp_prefix(mine, lane), total = __shfl_sync(kFullWarp, prefix, kWarp - 1);
  int64_t wanted = shared.wanted;
  __syncwarp();
  if (first && wanted >= static_cast<int64_t>(total)) {  // all of them
    if (lane == 0) shared.wanted = shared.found = static_cast<int64_t>(total);
    return;
  }
  const int64_t above = static_cast<int64_t>(prefix - mine);
  if (wanted <= above || wanted > static_cast<int64_t>(prefix)) return;  // one lane is left
  wanted -= above;
  int digit = highest;
  for (; wanted > shared.count[digit]; --digit) wanted -= shared.count[digit];
  shared.known |= static_cast<uint64_t>(digit) << shift;
  shared.wanted = wanted;
  shared.found = shared.count[digit];
}

__global__ void __launch_bounds__(kMaxThreads, kMinCtas) reveal_kernel(RevealArgs a) {
  DI4C_SHARED(RevealShared, shared);
  const int rank = threadIdx.x, size = blockDim.x;
  for (int64_t k = blockIdx.x; k < a.B * a.draws; k += gridDim.x) {
    const Sequence sequence{a, k / a.draws, k % a.draws};
    for (int64_t d = rank; d < a.D; d += size) sequence.prepare(d);
    const int64_t count = a.count[sequence.b];
    uint64_t least = ~uint64_t{0};  // above all orders
    if (count > 0) {
      if (rank == 0) shared.known = 0, shared.wanted = count;
      for (int shift = kOrderBits - kDigitBits;; shift -= kDigitBits) {
        const bool first = shift == kOrderBits - kDigitBits;
        for (int i = rank; i < kDigits; i += size) shared.count[i] = 0;
        __syncthreads();
        const uint64_t known = shared.known;
        for (int64_t d = rank; d < a.D; d += size) {
          const uint64_t order = sequence.order(d);
          if (order == 0 || (!first && order >> (shift + kDigitBits) != known >> (shift + kDigitBits))) continue;
          atomicAdd(&shared.count[order >> shift & (kDigits - 1)], 1u);
        }
        __syncthreads();
        if (rank < kWarp) next_digit(shared, shift, first, rank);
        __syncthreads();
        if (shared.wanted == shared.found) break;
      }
      least = shared.known;
      __syncthreads();  // the next sequence writes there
    }
    for (int64_t d = rank; d < a.D; d += size) {
      const uint64_t order = sequence.order(d);
      if (order != 0) a.x_s[sequence.at(d)] = order >= least ? a.tokens[sequence.at(d)] : a.mask_id;
    }
  }
}

}  // namespace di4c::cuda
