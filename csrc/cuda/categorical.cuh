// Random bits, categorical draws and the absorbing step.
//
// A row is read once however many draws are taken: a warp per chunk finds its maximum and mass, integer masses
// choose a chunk, and only the chosen chunk is read again (masses.h). Rows of up to kPackedStates classes share a
// warp and stay in its registers, rows of up to kWarpChunks chunks need one warp, longer ones a CTA or, where they are
// few, several (team.cuh): their warps share first the chunks and then the draws.
#pragma once
#include "chunk.cuh"
#include "team.cuh"

namespace di4c::cuda {

constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kPackedStates = kWarp * kVector, kWarpChunks = 2;

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

  __device__ __forceinline__ Draws(const SampleArgs& args, int64_t i) : a(args), b(i / args.D), d(i - b * args.D) {}

  __device__ __forceinline__ Bits128 bits(int64_t draw, uint32_t use) const {
    return philox(static_cast<uint64_t>(a.keys[b]), static_cast<uint64_t>(a.first + d), static_cast<uint32_t>(draw),
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

  // Puts a draw that keeps x_t; false for one that does not.
  __device__ __forceinline__ bool put_kept(int64_t draw) const {
    if (wanted(draw)) return false;
    put(draw, a.x_t[b * a.D + d], 0.0f);
    return true;
  }
};

// Of the positions i to i + count, at most 32, those that some draw wants, as bits; the draws that keep x_t are put.
// Rows that nobody wants cost what is read and written here. By one warp.
__device__ __forceinline__ unsigned wanted_rows(const SampleArgs& a, int64_t i, int count, int lane) {
  unsigned mine = 0;
  if (a.x_t == nullptr) {
    mine = count == kWarp ? kFullWarp : (1u << count) - 1;
  } else {
    for (int64_t k = lane; k < count * a.draws; k += kWarp) {
      const int64_t row = k / a.draws;
      if (!Draws(a, i + row).put_kept(k - row * a.draws)) mine |= 1u << row;
    }
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) mine |= __shfl_xor_sync(kFullWarp, mine, step);
  return mine;
}

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

// Rows of at most kPackedStates classes, kVector to a lane, as many rows to a warp as fit.
template <int kDType>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas) sample_packed_kernel(SampleArgs a, int lanes) {
  const int lane = threadIdx.x, in_row = lane % lanes, first_lane = lane - in_row;
  const int64_t begin = in_row * kVector, rows = a.B * a.D;
  const unsigned row_lanes = lanes == kWarp ? kFullWarp : ((1u << lanes) - 1) << first_lane;
  const int64_t per_warp = kWarp / lanes;
  for (int64_t turn = first_row() * per_warp; turn < rows; turn += row_step() * per_warp) {
    const int64_t i = turn + lane / lanes;
    const bool inside = i < rows;
    const Draws draws(a, inside ? i : 0);
    bool some = false;
    for (int64_t draw = in_row; inside && draw < a.draws; draw += lanes) some = !draws.put_kept(draw) || some;
    const bool read = (__ballot_sync(kFullWarp, some) & row_lanes) != 0;

    float x[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) x[j] = -INFINITY;
    if (read) {
      const SampledRow<kDType> row(a, draws.b, draws.d);
      if (begin + kVector <= a.S) {
        row.row.load(begin, x);
#pragma unroll
        for (int j = 0; j < kVector; ++j) x[j] = row.shaped(x[j], begin + j);
      } else {
#pragma unroll
        for (int j = 0; j < kVector; ++j) x[j] = row.at(begin + j);
      }
    }
    float max = x[0], sum = 0.0f;
#pragma unroll
    for (int j = 1; j < kVector; ++j) max = fmaxf(max, x[j]);
    for (int step = 1; step < lanes; step *= 2) max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, step));
    const bool finite = fabsf(max) != INFINITY;
    uint64_t mass[kVector], prefix = 0;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float e = finite ? exp_nonpos(x[j] - max) : x[j] == x[j] ? 0.0f : NAN;
      sum += e;
      mass[j] = e == e ? fixed_point(e) : 0;
      prefix += mass[j];
    }
    for (int step = 1; step < lanes; step *= 2) {
      sum += __shfl_xor_sync(kFullWarp, sum, step);
      const uint64_t below = __shfl_up_sync(kFullWarp, prefix, step);
      if (in_row >= step) prefix += below;
    }
    const RowStats all = row_stats(a, max, sum != sum, sum);
    const uint64_t total = __shfl_sync(kFullWarp, prefix, first_lane + lanes - 1);
    int fixed = kVector;  // where the lane holds the row's maximum first
#pragma unroll
    for (int j = kVector - 1; j >= 0; --j) fixed = x[j] == max ? j : fixed;
    const unsigned holds = __ballot_sync(kFullWarp, fixed < kVector) & row_lanes;

    for (int64_t draw = 0; draw < a.draws; ++draw) {
      const bool wanted = inside && draws.wanted(draw);
      const uint64_t r = below(wanted ? draws.bits(draw, kToken).b : 0, total);
      const unsigned above = __ballot_sync(kFullWarp, r < prefix) & row_lanes;
      const unsigned owners = all.certain ? holds : above;  // the first of them has the class
      const int owner = all.bad || owners == 0 ? first_lane : __ffs(static_cast<int>(owners)) - 1;
      if (!wanted || lane != owner) continue;
      if (all.bad) {
        draws.put(draw, kBadRow, NAN);
      } else if (all.certain) {
        draws.put(draw, begin + fixed, 0.0f);
      } else {
        uint64_t upto = prefix;
        int j = kVector;  // from the last class down: the first whose masses up to it exceed r
        float chosen = x[0];
#pragma unroll
        for (int k = kVector - 1; k >= 0; --k) {
          j = r < upto ? k : j;
          chosen = r < upto ? x[k] : chosen;
          upto -= mass[k];
        }
        draws.put(draw, begin + j, drawn_log_prob(all, chosen));
      }
    }
  }
}

// Rows of at most kWarpChunks chunks, a warp to each, which looks at `tile` positions at a time.
template <int kDType>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas) sample_warp_kernel(SampleArgs a, int tile) {
  const int lane = threadIdx.x, chunks = static_cast<int>(ceil_div(a.S, kChunk));
  const int64_t rows = a.B * a.D;
  for (int64_t first = first_row() * tile; first < rows; first += row_step() * tile) {
    const int count = static_cast<int>(rows - first < tile ? rows - first : tile);
    for (unsigned left = wanted_rows(a, first, count, lane); left != 0; left &= left - 1) {
      const Draws draws(a, first + __ffs(static_cast<int>(left)) - 1);
      const SampledRow<kDType> row(a, draws.b, draws.d);
      ChunkStats mine = {-INFINITY, 0.0f};  // lane c has chunk c's
      for (int c = 0; c < chunks; ++c) {
        const ChunkStats stats = row.stats(c, lane);
        if (lane == c) mine = stats;
      }
      const float max = warp_max(mine.max);
      const bool nan = __any_sync(kFullWarp, mine.sum != mine.sum), finite = !nan && fabsf(max) != INFINITY;
      const double value = finite && mine.sum > 0.0f ? chunk_value(mine.sum, mine.max, max) : 0.0;
      const double total = warp_sum(value);
      const RowStats all = row_stats(a, max, nan, total);
      // Votes, that the compiler may know each branch to be one for all lanes.
      const bool random = __any_sync(kFullWarp, !all.bad && !all.certain);
      const bool greedy = __any_sync(kFullWarp, !all.bad && all.certain);
      const int top_chunk = __ffs(static_cast<int>(__ballot_sync(kFullWarp, mine.max == max))) - 1;
      const int64_t fixed = greedy ? row.first_equal(top_chunk, max, lane) : kBadRow;
      const uint64_t chunk_prefix = warp_prefix(random ? chunk_mass(value, chunk_scale(total)) : 0, lane);
      int known = -1;  // the chunk whose masses `prefix` holds
      uint64_t prefix = 0;
      for (int64_t draw = 0; draw < a.draws; ++draw) {
        if (!__any_sync(kFullWarp, draws.wanted(draw))) continue;
        int64_t token = fixed;
        float log_prob = all.bad ? NAN : 0.0f;
        if (random) {
          const Bits128 bits = draws.bits(draw, kToken);
          const int c = first_above(chunk_prefix, below(bits.a, __shfl_sync(kFullWarp, chunk_prefix, kWarp - 1)));
          const float top = __shfl_sync(kFullWarp, mine.max, c);
          if (__any_sync(kFullWarp, c != known)) prefix = row.mass_prefix(c, top, lane);
          known = c;
          token = row.pick_class(c, top, prefix, bits.b, lane);
          log_prob = drawn_log_prob(all, row.at(token));
        }
        if (lane == 0) draws.put(draw, token, log_prob);
      }
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

// Whatever draws row i wants, by a CTA that has its table.
template <int kDType>
__device__ __forceinline__ void draw_row(const SampleArgs& a, const Draws& draws, const SampledRow<kDType>& row,
                                         const ChunkTable& table, int chunks) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
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
}

// Long rows, a CTA or a team of CTAs to each, which looks at `tile` positions at a time (all of a team look, and put
// the same). The team's first CTA draws, or whichever comes last where they draw tickets.
template <int kDType>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas) sample_long_kernel(SampleArgs a, Split split, int tile) {
  DI4C_SHARED(ChunkTable, table);
  using Pending = unsigned[2];
  DI4C_SHARED(Pending, pending);  // two, for what is next is written while some still read
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int chunks = static_cast<int>(ceil_div(a.S, kChunk)), team = static_cast<int>(split.team());
  const int rank = static_cast<int>(blockIdx.x % team);
  const int64_t rows = a.B * a.D, step = int64_t{gridDim.x / team} * tile;
  int turn = 0;
  for (int64_t first = int64_t{blockIdx.x / team} * tile; first < rows; first += step, turn ^= 1) {
    const int count = static_cast<int>(rows - first < tile ? rows - first : tile);
    if (warp == 0) {
      const unsigned wanted = wanted_rows(a, first, count, lane);
      if (lane == 0) pending[turn] = wanted;
    }
    __syncthreads();
    for (unsigned left = pending[turn]; left != 0; left &= left - 1) {
      const int64_t i = first + __ffs(static_cast<int>(left)) - 1;
      const Draws draws(a, i);
      const SampledRow<kDType> row(a, draws.b, draws.d);
      // The first CTA has started and is done with its table of the row before.
      if (split.way == kCluster) {
        cluster_sync();
      } else {
        __syncthreads();
      }
      ChunkTable& shared = split.way == kCluster ? *in_peer(&table, 0) : table;
      float* left_behind = split.way == kTicket ? split.partials + i * 2 * chunks : nullptr;
      for (int c = rank * warps + warp; c < chunks; c += team * warps) {
        const ChunkStats stats = row.stats(c, lane);
        if (lane != 0) continue;
        (left_behind != nullptr ? left_behind : shared.max)[c] = stats.max;
        (left_behind != nullptr ? left_behind + chunks : shared.sum)[c] = stats.sum;
      }
      if (split.way == kCluster) {
        cluster_sync();
        if (rank != 0) continue;
      } else if (split.way == kTicket) {
        if (!last_to_come(split.tickets + i, split.parts)) continue;
        for (int c = threadIdx.x; c < chunks; c += blockDim.x) {
          table.max[c] = __ldcg(left_behind + c);
          table.sum[c] = __ldcg(left_behind + chunks + c);
        }
        __syncthreads();
      } else {
        __syncthreads();
      }
      if (warp == 0) finish_table(a, table, chunks, lane);
      __syncthreads();
      draw_row(a, draws, row, table, chunks);
    }
  }
}

}  // namespace di4c::cuda
