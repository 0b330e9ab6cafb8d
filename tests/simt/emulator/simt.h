// A CUDA grid on the CPU: one CTA at a time, every thread of it a fiber that runs until it meets a barrier or a
// warp operation. Between two of those the order of the threads is free, and here it is chosen: by index, or at
// random from a seed. A barrier that not all threads of the CTA or warp reach is an error, not a hang.
#pragma once
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

// 0: threads in the order of their index, CTAs in theirs. Any other: threads in random order, CTAs backwards
// where the seed is odd.
void set_order(uint64_t seed);

void run_grid(dim3 grid, dim3 block, const std::function<void()>& thread);

// All threads of the CTA; returns whether any of them gave true.
bool meet_cta(bool flag, Site site);

// All lanes of the warp; returns what each handed in.
const uint64_t* meet_warp(uint64_t value, unsigned mask, Site site);

unsigned lane();

// Prints and ends the process.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace simt
