// Random bits, categorical draws and the absorbing step.
//
// A row is read once however many draws are taken: a warp per chunk finds its maximum and mass, integer masses
// choose a chunk, and only the chosen chunk is read again (masses.h). Rows of one chunk need one warp; longer
// rows get a CTA, whose warps share first the chunks and then the draws.
#pragma once
#include "chunk.cuh"

namespace di4c::cuda {

constexpr int kMaxWarps = kMaxThreads / kWarp;

__global__ void __launch_bounds__(kMaxThreads, kMinCtas) random_bits_kernel(RandomBitsArgs a) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < a.B * a.N; i += step) {
    const Bits128 bits = philox(static_cast<uint64_t>(a.keys[i / a.N]), static_cast<uint64_t>(i % a.N), 0, a.stream);
    a.out[2 * i] = static_cast<int64_t>(bits.a);
    a.out[2 * i + 1] = static_cast<int64_t>(bits.b);
  }
}

// The draws of position (b, d): which are wanted, and where they go.
struct Draws {
  const SampleArgs& a;
  int64_t b, d;

  __device__ __forceinline__ Bits128 bits(int64_t draw, uint32_t use) const {
    return philox(static_cast<uint64_t>(a.keys[b]), static_cast<uint64_t>(d), static_cast<uint32_t>(draw),
                  stream_word(a.stream, use));
  }

  // The coin does not depend on the logits: rows that stay as they are need not be read.
  __device__ __forceinline__ bool wanted(int64_t draw) const {
    if (a.x_t == nullptr) return true;
    return a.x_t[b * a.D + d] == a.mask_id && unit_double(bits(draw, kCoin).a) < a.unmask_prob[b];
  }

  __device__ __forceinline__ void put(int64_t draw, int64_t token, float log_prob) const {
    const int64_t i = (b * a.draws + draw) * a.D + d;
    a.tokens[i] = token;
    if (a.log_prob != nullptr) a.log_prob[i] = log_prob;
  }

  // Puts the draws that keep x_t, dealt to `size` threads; true if this thread met one that does not.
  __device__ __forceinline__ bool put_kept(int rank, int size) const {
    bool some = false;
    for (int64_t draw = rank; draw < a.draws; draw += size) {
      if (wanted(draw)) {
        some = true;
      } else {
        put(draw, a.x_t[b * a.D + d], 0.0f);
      }
    }
    return some;
  }
};

// What a row's chunks say together.
struct RowStats {
  float max;
  bool bad;        // a NaN, or no class has mass
  bool certain;    // temperature 0 or a +inf: the first largest class, with log-probability 0
  double log_sum;  // of exp(x - max)
};

__device__ __forceinline__ RowStats row_stats(const SampleArgs& a, float max, bool nan, double total) {
  return {max, nan || max == -INFINITY, a.temperature == 0.0f || max == INFINITY, log(total)};
}

__device__ __forceinline__ float drawn_log_prob(const RowStats& row, float x) {
  return static_cast<float>(static_cast<double>(x) - static_cast<double>(row.max) - row.log_sum);
}

// Rows of at most kChunk classes, a warp to each.
template <int kDType>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas) sample_short_kernel(SampleArgs a) {
  const int lane = threadIdx.x;
  for (int64_t i = first_row(); i < a.B * a.D; i += row_step()) {
    const Draws draws{a, i / a.D, i % a.D};
    if (!__any_sync(kFullWarp, draws.put_kept(lane, kWarp))) continue;
    const SampledRow<kDType> row(a, draws.b, draws.d);
    const ChunkStats chunk = row.stats(0, lane);
    const RowStats all = row_stats(a, chunk.max, chunk.sum != chunk.sum, chunk.sum);
    // Votes, that the compiler may know each branch to be one for all lanes.
    const bool random = __any_sync(kFullWarp, !all.bad && !all.certain);
    const bool greedy = __any_sync(kFullWarp, !all.bad && all.certain);
    const int64_t fixed = greedy ? row.first_equal(0, all.max, lane) : kBadRow;
    const uint64_t prefix = random ? row.mass_prefix(0, all.max, lane) : 0;
    for (int64_t draw = 0; draw < a.draws; ++draw) {
      if (!__any_sync(kFullWarp, draws.wanted(draw))) continue;
      int64_t token = fixed;
      float log_prob = all.bad ? NAN : 0.0f;
      if (random) {
        token = row.pick_class(0, all.max, prefix, draws.bits(draw, kToken).b, lane);
        log_prob = drawn_log_prob(all, row.at(token));
      }
      if (lane == 0) draws.put(draw, token, log_prob);
    }
  }
}

struct ChunkTable {
  float max[kMaxChunks], sum[kMaxChunks];
  uint64_t prefix[kMaxChunks];  // masses up to and with each chunk
  RowStats row;
  int first;  // the first chunk that holds the row's maximum
};

// By one warp, each lane kPer consecutive chunks.
__device__ __forceinline__ void finish_table(const SampleArgs& a, ChunkTable& table, int chunks, int lane) {
  constexpr int kPer = kMaxChunks / kWarp;
  const int begin = lane * kPer, end = begin + kPer < chunks ? begin + kPer : chunks;
  float max = -INFINITY;
  bool nan = false;
  for (int c = begin; c < end; ++c) {
    max = fmaxf(max, table.max[c]);
    nan = nan || table.sum[c] != table.sum[c];
  }
  max = warp_max(max);
  nan = __any_sync(kFullWarp, nan);

  bool holds = false;
  double mine = 0.0;
  const auto value = [&](int c) { return table.sum[c] > 0.0f ? chunk_value(table.sum[c], table.max[c], max) : 0.0; };
  const bool finite = !nan && fabsf(max) != INFINITY;
  for (int c = begin; c < end; ++c) {
    holds = holds || table.max[c] == max;
    if (finite) mine += value(c);
  }
  const double total = warp_sum(mine);
  const double scale = finite ? chunk_scale(total) : 1.0;
  uint64_t mass = 0;
  for (int c = begin; finite && c < end; ++c) mass += chunk_mass(value(c), scale);
  uint64_t prefix = warp_prefix(mass, lane) - mass;
  for (int c = begin; c < end; ++c) {
    if (finite) prefix += chunk_mass(value(c), scale);
    table.prefix[c] = prefix;
  }

  const int owner = __ffs(static_cast<int>(__ballot_sync(kFullWarp, holds))) - 1;
  if (lane == owner) {
    int c = begin;
    while (table.max[c] != max) ++c;
    table.first = c;
  }
  if (lane == 0) table.row = row_stats(a, max, nan, total);
}

// The chunk that the first 64 bits choose.
__device__ __forceinline__ int pick_chunk(const ChunkTable& table, int chunks, uint64_t bits, int lane) {
  const uint64_t r = below(bits, table.prefix[chunks - 1]);
  for (int begin = 0;; begin += kWarp) {
    const int c = begin + lane;
    const unsigned hits = __ballot_sync(kFullWarp, c >= chunks || r < table.prefix[c]);
    if (hits != 0) return begin + __ffs(static_cast<int>(hits)) - 1;
  }
}

// Rows of several chunks, a CTA to each.
template <int kDType>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas) sample_long_kernel(SampleArgs a) {
  __shared__ ChunkTable table;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp, warps = blockDim.x / kWarp;
  const int chunks = static_cast<int>(ceil_div(a.S, kChunk));
  for_positions(a.B, a.D, [&](int64_t b, int64_t d) {
    const Draws draws{a, b, d};
    // Also the barrier after which the table of the row before may be overwritten.
    if (!__syncthreads_or(draws.put_kept(thread, blockDim.x))) return;
    const SampledRow<kDType> row(a, b, d);
    for (int c = warp; c < chunks; c += warps) {
      const ChunkStats stats = row.stats(c, lane);
      if (lane == 0) {
        table.max[c] = stats.max;
        table.sum[c] = stats.sum;
      }
    }
    __syncthreads();
    if (warp == 0) finish_table(a, table, chunks, lane);
    __syncthreads();
    const RowStats all = table.row;
    for (int64_t draw = warp; draw < a.draws; draw += warps) {
      if (!__any_sync(kFullWarp, draws.wanted(draw))) continue;  // a vote: the compiler knows it is one for all lanes
      int64_t token = kBadRow;
      float log_prob = all.bad ? NAN : 0.0f;
      if (__any_sync(kFullWarp, !all.bad && !all.certain)) {
        const Bits128 bits = draws.bits(draw, kToken);
        const int c = pick_chunk(table, chunks, bits.a, lane);
        const float top = table.max[c];
        token = row.pick_class(c, top, row.mass_prefix(c, top, lane), bits.b, lane);
        log_prob = drawn_log_prob(all, row.at(token));
      } else if (__any_sync(kFullWarp, !all.bad)) {
        token = row.first_equal(table.first, all.max, lane);
      }
      if (lane == 0) draws.put(draw, token, log_prob);
    }
  });
}

}  // namespace di4c::cuda
