// Long rows are cut into parts: how many, S alone decides. A part is summed by one CTA and the parts are merged in
// their order, so that it changes no bit of a result who sums them:
//   turns    one CTA, one part after another, where rows are many
//   cluster  a cluster of CTAs, a part to each, that write to each other's shared memory (sm_90 and later)
//   ticket   CTAs, a part to each, that leave their sums in a workspace and draw a ticket; the last one merges
#pragma once
#include "group.cuh"

namespace di4c::cuda {

constexpr int kMaxParts = 8;  // the largest cluster every device has

DI4C_FN constexpr int row_parts(int64_t S) {
  return S <= kLongRow ? 1 : S <= 2 * kLongRow ? 2 : S <= 4 * kLongRow ? 4 : kMaxParts;
}

// Classes of a part, but the last: whole lines of memory.
DI4C_FN constexpr int64_t part_length(int64_t S, int parts) { return ceil_div(ceil_div(S, parts), 64) * 64; }

enum Way : int { kTurns, kCluster, kTicket };

struct Split {
  Way way;
  int parts;
  uint32_t* tickets;  // one to a row, 0 between launches
  float* partials;    // what each part of each row came to

  constexpr unsigned team() const { return way == kTurns ? 1u : static_cast<unsigned>(parts); }  // CTAs to a row
};

// All CTAs of the cluster; what they wrote to each other's shared memory is there afterwards.
__device__ __forceinline__ void cluster_sync() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
#endif
}

// Where CTA `rank` of the cluster has what this CTA has at p.
template <class T>
__device__ __forceinline__ T* in_peer(T* p, int rank) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(p, static_cast<unsigned>(rank)));
#else
  return p;
#endif
}

// By all threads of a CTA once it has written its partials of a row: true in the last of `parts` CTAs to come, which
// may read them all (by __ldcg) and leaves the ticket as it was found.
__device__ __forceinline__ bool last_to_come(uint32_t* ticket, int parts) {
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1u) == static_cast<uint32_t>(parts - 1);
    if (last) *ticket = 0;
    __threadfence();
  }
  return __syncthreads_or(last);
}

// What the parts of a row came to, kValues numbers each. In two copies: what is put next does not disturb who still
// reads.
template <int kValues>
struct PartTable {
  float value[2][kMaxParts][kValues];
};

// The CTAs that share a row. All threads of all of them must call its functions together.
template <int kValues>
class Team {
 public:
  __device__ __forceinline__ Team(const Split& split, PartTable<kValues>& table)
      : split_(split), table_(table), rank_(static_cast<int>(blockIdx.x % split.team())) {
    if (split.way == kCluster) cluster_sync();  // no one writes to a CTA that has not started
  }

  __device__ __forceinline__ int64_t first_row() const { return blockIdx.x / split_.team(); }
  __device__ __forceinline__ int64_t row_step() const { return gridDim.x / split_.team(); }
  __device__ __forceinline__ bool leads() const { return rank_ == 0; }

  // Calls f(part) for the parts that are this CTA's to sum.
  template <class F>
  __device__ __forceinline__ void each_part(F f) const {
    if (split_.way != kTurns) return f(rank_);
    for (int part = 0; part < split_.parts; ++part) f(part);
  }

  // Hands in what a part of a row came to, known to all threads.
  __device__ __forceinline__ void put(int64_t row, int part, const float (&v)[kValues]) const {
    const int thread = threadIdx.x;
    if (split_.way == kCluster ? thread >= split_.parts : thread > 0) return;
    float* place = split_.way == kTicket ? split_.partials + (row * kMaxParts + part) * kValues
                                         : table_.value[turn_][part];
    if (split_.way == kCluster) place = in_peer(place, thread);  // a thread to each peer
#pragma unroll
    for (int k = 0; k < kValues; ++k) place[k] = v[k];
  }

  // After every part has been put: whether this CTA holds them all, for `get`.
  __device__ __forceinline__ bool meet(int64_t row) {
    bool holds = true;
    if (split_.way == kTurns) {
      __syncthreads();
    } else if (split_.way == kCluster) {
      cluster_sync();
    } else {
      holds = last_to_come(split_.tickets + row, split_.parts);
      if (holds) {
        float* all = table_.value[turn_][0];
        for (int i = threadIdx.x; i < split_.parts * kValues; i += blockDim.x)
          all[i] = __ldcg(split_.partials + row * kMaxParts * kValues + i);
        __syncthreads();
      }
    }
    turn_ ^= 1;
    return holds;
  }

  // Of the CTAs that hold a row's parts, the one to write what they say.
  __device__ __forceinline__ bool writes(bool holds) const { return split_.way == kCluster ? leads() : holds; }

  __device__ __forceinline__ float get(int part, int k) const { return table_.value[turn_ ^ 1][part][k]; }
  __device__ __forceinline__ int parts() const { return split_.parts; }

 private:
  const Split& split_;
  PartTable<kValues>& table_;
  int rank_, turn_ = 0;
};

}  // namespace di4c::cuda
