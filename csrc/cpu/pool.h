// The threads that share a kernel's work.
#pragma once
#include <cstddef>
#include <cstdint>

namespace di4c::cpu {

// One piece of work: `context` as given to run(), the piece's number, and scratch memory of the thread doing it.
using Task = void (*)(void* context, int64_t index, void* scratch);

// Calls task(context, i, scratch) for every i in [0, tasks), on up to `threads` threads, the caller's included, and
// returns when all are done. Which thread takes which piece is left open, so a piece must write what no other writes.
// `scratch_bytes` (0 allowed) of 64-byte aligned, uninitialised memory belong to each thread. Throws std::bad_alloc.
// A second caller while the pool is busy works alone; so does a forked child until its own pool exists.
void run(int64_t tasks, int threads, size_t scratch_bytes, Task task, void* context);

}  // namespace di4c::cpu
