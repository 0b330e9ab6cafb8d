// A CUDA grid on the CPU: every thread is a fiber that runs until it meets a barrier or a warp operation. Between two
// of those the order of the threads is free, and here it is chosen: by index, or at random from a seed. A barrier
// that not all threads of the warp, CTA or cluster reach is an error, not a hang.
//
// The CTAs of a cluster run together. In random orders several clusters (or single CTAs) do, a thread of one going on
// at a barrier, atomic or fence of another's. Shared memory by SIMT_SHARED is each CTA's own, fenced by the address
// sanitizer, and poisoned when the CTA has left. Plain `__shared__` is a static variable: a kernel that uses it runs
// one CTA at a time.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace simt {

constexpr unsigned kWarp = 32;

struct Site {  // a place in the source: all who meet must meet at the same
  const char* file;
  int line;
  bool operator!=(const Site& other) const { return file != other.file || line != other.line; }
};

// 0: threads in the order of their index, CTAs in theirs and one after another. Any other: both at random.
void set_order(uint64_t seed);

// Clusters of `cluster` CTAs along x; `dynamic` bytes of shared memory beyond what the kernel declares.
void run_grid(dim3 grid, dim3 block, unsigned cluster, size_t dynamic, const std::function<void()>& thread);

// All threads of the CTA; returns whether any of them gave true.
bool meet_cta(bool flag, Site site);

// All threads of the cluster.
void meet_cluster(Site site);

// All lanes of the warp; returns what each handed in.
const uint64_t* meet_warp(uint64_t value, unsigned mask, Site site);

// A place where another thread may go on: what others can see of this one's doings starts or ends here.
void pause();

unsigned lane();
unsigned rank_in_cluster();

// The CTA's own memory for the variable declared at `site`, the same for all its threads.
void* shared(Site site, size_t bytes);
void* dynamic_shared();

// Where the CTA of that rank in the cluster has what this CTA has at p.
void* in_peer(const void* p, unsigned rank);

// The kernel has a static variable for shared memory.
bool run_alone();

// Prints and ends the process.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace simt
