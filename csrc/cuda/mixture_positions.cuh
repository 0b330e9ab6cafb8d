// The forward's kernels: short rows have a warp to a position, long ones a CTA or, cut into slices, a cluster.
#pragma once
#include "mixture_forward.cuh"
#include "mixture_tokens.cuh"
#include "team.cuh"

namespace di4c::cuda {

// How long rows are shared out. `cluster` is 1 where one CTA takes all slices.
struct Slices {
  int count, cluster;
  int segments;  // of a slice of one row, a warp to each, while normalisers are summed
};

// Positions whose tokens are being fetched together, in a kernel that does little else; beside more, half of it.
constexpr int kTogether = 4;

// Eight positions to a CTA, a warp to each.
template <int kDType>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas) mixture_short_kernel(MixtureArgs p) {
  DI4C_SHARED(PositionShared, shared);
  const Group team(shared.scratch);
  float* pull = shared.pull[0] + threadIdx.y * kShortComponents;
  for (int64_t b = blockIdx.y; b < p.B; b += gridDim.y) {
    for (int64_t d0 = int64_t{blockIdx.x} * blockDim.y; d0 < p.D; d0 += int64_t{gridDim.x} * blockDim.y) {
      if (d0 + threadIdx.y < p.D) {
        const Position<kDType> position(p, b, d0 + threadIdx.y);
        position.keep_unread(team.rank, team.size);
        for (int64_t r = 0; position.used && r < position.rows(); ++r) {
          position.with_row(r, [&](const auto& row) {
            const Norm norm = norm_of(piece_online(row, p.S, 0, 1, team));
            if (team.rank == 0) position.keep(r, norm);
          });
        }
        for (int64_t l = team.rank; l < p.L; l += team.size) pull[l] = pull[kComponents + l] = 0.0f;
        team.sync();
        float sums[kParts] = {};
        if (position.diverges()) position.slice(team, shared.tile, 0, 1, sums, pull, kComponents);
        team.sync();
        for (int part = 0; part < kParts; ++part) {
          const float sum = team.sum(sums[part]);
          if (team.rank == 0) position.keep_part(part, sum);
        }
        for (int64_t l = team.rank; l < p.L; l += team.size)
          position.keep_pull(l, pull[l], pull[kComponents + l]);
      }
      const int64_t count = p.D - d0 < blockDim.y ? p.D - d0 : blockDim.y;
      if (p.K > 0) finish_block<kDType, kTogether / 2>(p, b, d0, count, shared.arrived);
    }
  }
}

// The CTAs that share a position: a cluster of them, or one that takes their slices in turn.
class Sharers {
 public:
  __device__ __forceinline__ explicit Sharers(const Slices& slices)
      : slices_(slices), rank_(slices.cluster > 1 ? static_cast<int>(blockIdx.x % slices.cluster) : 0) {
    if (slices.cluster > 1) cluster_sync();  // no one reads from a CTA that has not started
  }

  __device__ __forceinline__ bool leads() const { return rank_ == 0; }

  template <class F>
  __device__ __forceinline__ void each_slice(F f) const {
    if (slices_.cluster > 1) return f(rank_);
    for (int c = 0; c < slices_.count; ++c) f(c);
  }

  __device__ __forceinline__ void meet() const {
    if (slices_.cluster > 1) {
      cluster_sync();
    } else {
      __syncthreads();
    }
  }

  // The shared memory of the CTA that has slice c.
  template <class T>
  __device__ __forceinline__ T& of(T& own, int c) const {
    return slices_.cluster > 1 ? *in_peer(&own, c) : own;
  }

 private:
  const Slices& slices_;
  int rank_;
};

// The normalisers of all rows of a position: warps sum pieces of rows, threads put the pieces together in their order.
template <int kDType>
__device__ __forceinline__ void keep_norms(const Position<kDType>& position, const Slices& slices,
                                           const Sharers& sharers, PositionShared& shared) {
  const int64_t rows = position.rows();
  const int thread = threadIdx.x, pieces = slices.count * slices.segments;
  Group warp(shared.scratch);
  warp.rank = thread % kWarp;
  warp.size = kWarp;
  for (int64_t r0 = 0; r0 < rows; r0 += kRowsAtOnce) {
    const int n = static_cast<int>(rows - r0 < kRowsAtOnce ? rows - r0 : kRowsAtOnce);
    sharers.each_slice([&](int c) {
      for (int item = thread / kWarp; item < n * slices.segments; item += blockDim.x / kWarp) {
        const int i = item / slices.segments, segment = item % slices.segments;
        position.with_row(r0 + i, [&](const auto& row) {
          const Online sum = piece_online(row, position.p.S, c * slices.segments + segment, pieces, warp);
          if (warp.rank == 0) {
            shared.pieces.max[c][i][segment] = sum.max;
            shared.pieces.sum[c][i][segment] = sum.sum;
          }
        });
      }
    });
    sharers.meet();
    if (thread < n) {  // every CTA of a cluster keeps the same bits, and reads its own
      Online all;
#pragma unroll 1
      for (int piece = 0; piece < pieces; ++piece) {
        const int c = piece / slices.segments, segment = piece % slices.segments;
        all.max = fmaxf(all.max, sharers.of(shared, c).pieces.max[c][thread][segment]);
      }
#pragma unroll 1
      for (int piece = 0; piece < pieces; ++piece) {
        const int c = piece / slices.segments, segment = piece % slices.segments;
        const Pieces& of = sharers.of(shared, c).pieces;
        all.sum += of.sum[c][thread][segment] * exp_quick(of.max[c][thread][segment] - all.max);
      }
      position.keep(r0 + thread, norm_of(all));
    }
    sharers.meet();  // the pieces are written again, and the normalisers read
  }
}

// The parts and pulls of a position: slice by slice, and then over the slices in their order.
template <int kDType>
__device__ __forceinline__ void keep_divergences(const Position<kDType>& position, const Slices& slices,
                                                 const Sharers& sharers, PositionShared& shared) {
  const Group team(shared.scratch);
  const MixtureArgs& p = position.p;
  const auto fold = [&](int begin, int end) {  // slices [begin, end) onto what was kept of those before
#pragma unroll 1
    for (int plane = 0; plane < 2; ++plane) {
      if (plane == 0 ? p.teacher.data == nullptr : p.T == 0) continue;
      float* to = p.pull + (plane == 1 ? position.target_pull() : 0) + position.b * p.L * p.D + position.d;
#pragma unroll 1
      for (int64_t l = team.rank; l < p.L; l += team.size) {
        float sum = begin > 0 ? to[l * p.D] : 0.0f;
#pragma unroll 1
        for (int c = begin; c < end; ++c) sum += sharers.of(shared, c).pull[plane][l];
        to[l * p.D] = sum;
      }
    }
    if (team.rank < kParts) {
      float sum = begin > 0 ? p.row[(team.rank * p.B + position.b) * p.D + position.d] : 0.0f;
      for (int c = begin; c < end; ++c) sum += sharers.of(shared, c).parts[team.rank];
      position.keep_part(team.rank, sum);
    }
  };
  sharers.each_slice([&](int c) {
    for (int64_t l = team.rank; l < p.L; l += team.size) shared.pull[0][l] = shared.pull[1][l] = 0.0f;
    float sums[kParts] = {};
    team.sync();
    position.slice(team, shared.tile, c, slices.count, sums, shared.pull[0], kComponents);
    for (int part = 0; part < kParts; ++part) {
      const float sum = team.sum(sums[part]);
      if (team.rank == 0) shared.parts[part] = sum;
    }
    team.sync();
    if (slices.cluster == 1) {
      fold(c, c + 1);
      team.sync();
    }
  });
  if (slices.cluster > 1) {
    sharers.meet();
    if (sharers.leads()) fold(0, slices.count);
    sharers.meet();
  }
}

// A CTA or a cluster to a position. With kDiverges its rows are read again for the divergences, and the sequences have
// a kernel of their own: both do not fit into the registers of one.
template <int kDType, bool kDiverges>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas) mixture_long_kernel(MixtureArgs p, Slices slices) {
  DI4C_SHARED(PositionShared, shared);
  const Sharers sharers(slices);
  const int thread = threadIdx.x, threads = blockDim.x;
  for (int64_t b = blockIdx.y; b < p.B; b += gridDim.y) {
    for (int64_t d = blockIdx.x / slices.cluster; d < p.D; d += gridDim.x / slices.cluster) {
      const Position<kDType> position(p, b, d);
      if (sharers.leads()) position.keep_unread(thread, threads);
      if (position.used) keep_norms(position, slices, sharers, shared);
      if (kDiverges && position.diverges()) {
        keep_divergences(position, slices, sharers, shared);
      } else if (sharers.leads()) {
        for (int64_t l = thread; l < p.L; l += threads) position.keep_pull(l, 0.0f, 0.0f);
        if (thread < kParts) position.keep_part(thread, 0.0f);
      }
      if (!kDiverges && p.K > 0 && sharers.leads()) finish_block<kDType, kTogether>(p, b, d, 1, shared.arrived);
    }
  }
}

// The sequences of a block of positions to a CTA.
template <int kDType>
__global__ void __launch_bounds__(kMaxThreads, kMinCtas) mixture_sequences_kernel(MixtureArgs p) {
  const int64_t blocks = ceil_div(p.D, kPositions);
  for_positions(p.B, blocks, [&](int64_t b, int64_t block) {
    sequences_of_block<kDType, kTogether>(p, b, block, blocks);
  });
}

}  // namespace di4c::cuda
