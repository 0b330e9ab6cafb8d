// Draws of classes in proportion to the product of two tables' rows (product.h), a warp to each.
//
// The rows are looked at three times, for the largest product, the sum of the masses and the class; but the tables are
// small and the rows short: all but the first look, and most of that, find them in the caches.
#pragma once
#include "di4c/api.h"
#include "di4c/product.h"
#include "group.cuh"

namespace di4c::cuda {

__device__ __forceinline__ uint64_t warp_max_bits(uint64_t v) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const uint64_t other = __shfl_xor_sync(kFullWarp, v, step);
    v = other > v ? other : v;
  }
  return v;
}

struct Product {
  const double *left, *right;
  double base;
  int64_t S;

  __device__ __forceinline__ uint64_t bits(int64_t s) const { return product_bits(left[s], right[s], base); }

  __device__ __forceinline__ uint64_t mass(int64_t s, ProductScale scale) const {
    return s < S ? product_mass(bits(s), scale) : 0;
  }
};

// The class that the random bits choose, the same in every lane.
__device__ __forceinline__ int64_t draw_product(const Product& product, uint64_t random, int lane) {
  uint64_t top = 0;
  bool negative = false;
  for (int64_t s = lane; s < product.S; s += kWarp) {
    const uint64_t bits = product.bits(s);
    top = bits > top ? bits : top;
    negative = negative || (bits & kDoubleSign);
  }
  top = warp_max_bits(top);
  if (bad_product(top, __any_sync(kFullWarp, negative) ? kDoubleSign : 0)) return kBadRow;

  const ProductScale scale = product_scale(top, product.S);
  uint64_t mine = 0;
  for (int64_t s = lane; s < product.S; s += kWarp) mine += product.mass(s, scale);
  uint64_t r = below(random, warp_sum(mine));
  for (int64_t begin = 0;; begin += kWarp) {
    const uint64_t prefix = warp_prefix(product.mass(begin + lane, scale), lane);
    const unsigned above = __ballot_sync(kFullWarp, r < prefix);
    if (above != 0) return begin + __ffs(static_cast<int>(above)) - 1;
    r -= __shfl_sync(kFullWarp, prefix, kWarp - 1);
  }
}

__global__ void __launch_bounds__(kMaxThreads, kMinCtas) sample_product_kernel(ProductArgs a) {
  const int lane = threadIdx.x;
  for (int64_t k = first_row(); k < a.B * a.draws * a.D; k += row_step()) {
    const int64_t sequence = k / a.D, d = k - sequence * a.D, b = sequence / a.draws, draw = sequence - b * a.draws;
    const int64_t i = a.i[b * a.D + d], j = a.j[k];
    int64_t token = kBadRow;
    if (i >= 0 && i < a.S && j >= 0 && j < a.S) {
      const int64_t table = (a.N == 1 ? 0 : b) * a.S;
      const double base = a.base == nullptr ? 0.0 : a.base[(table + i) * a.S + j];
      const Product product{a.left + (table + i) * a.S, a.right + (table + j) * a.S, base, a.S};
      const Bits128 bits = philox(static_cast<uint64_t>(a.keys[b]), static_cast<uint64_t>(d),
                                  static_cast<uint32_t>(draw), stream_word(a.stream, kCoin));
      token = draw_product(product, bits.a, lane);
    }
    if (lane == 0) a.tokens[k] = token;
  }
}

}  // namespace di4c::cuda
