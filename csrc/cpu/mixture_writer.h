// Where a piece of the gradient goes: into its row, past the caches where the gradient is large, or into the two sums
// of a logistic row.
#pragma once
#include "mixture.h"

namespace di4c::cpu::DI4C_ISA {

// Whole vectors go past the caches; the ends of a piece, whose lines it shares with others, do not.
static inline void copy_past(void* target, const void* source, int64_t bytes) {
  char* to = static_cast<char*>(target);
  const char* from = static_cast<const char*>(source);
  const int64_t size = sizeof(f32), gap = (0 - reinterpret_cast<uintptr_t>(to)) % static_cast<uintptr_t>(size);
  const int64_t head = gap < bytes ? gap : bytes;
  if (head) memcpy(to, from, static_cast<size_t>(head));
  int64_t i = head;
  for (; i + size <= bytes; i += size) {
    f32 v;
    memcpy(&v, from + i, sizeof v);
    stream(to + i, v);
  }
  if (i < bytes) memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
}

struct GradientWriter {
  static constexpr int64_t kStreamBytes = 16 << 20;  // a gradient from this size on is written past the caches

  const MixtureBackwardArgs& args;
  const DType dtype;
  const bool past;
  float *out, *halves;  // (kChunk) each: room for a piece, and for one of half floats

  GradientWriter(const MixtureBackwardArgs& x, Arena& arena)
      : args(x), dtype(x.logits.dtype),
        past(x.grad != x.logits.data && x.B * x.L * x.D * row_bytes(dtype, x.S) >= kStreamBytes),
        out(arena.take<float>(kChunk)), halves(arena.take<float>(past && dtype != kFloat32 ? kChunk / 2 : 0)) {}

  // Where elements from `start` on are to be computed: in place, or in `room`.
  float* piece(int64_t row, int64_t start, float* room) const {
    return past ? room : write_target(grad_row(args.grad, dtype, row, args.S), dtype, start, room);
  }

  // Brings elements [start, start + n) of a row, at most kChunk, computed where `piece` said, to where they belong.
  void put(int64_t row, const Row& logits, int64_t start, int n, const float* piece, LogisticSum& head) const {
    char* grad = grad_row(args.grad, dtype, row, args.S);
    if (dtype == kLogistic) return logistic_pull(logits, start, n, piece, head);
    if (!past) return write(grad, dtype, start, n, piece);
    if (dtype == kFloat32) return copy_past(grad + row_bytes(dtype, start), piece, row_bytes(dtype, n));
    write(halves, dtype, 0, n, piece);
    copy_past(grad + row_bytes(dtype, start), halves, row_bytes(dtype, n));
  }

  // The two numbers of a logistic row whose pieces have all been put.
  void close(int64_t row, const LogisticSum& head) const {
    if (dtype != kLogistic) return;
    float* grad = reinterpret_cast<float*>(grad_row(args.grad, dtype, row, args.S));
    grad[0] = static_cast<float>(head.mean);
    grad[1] = static_cast<float>(head.log_scale);
  }
};

}  // namespace di4c::cpu::DI4C_ISA
