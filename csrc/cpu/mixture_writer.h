// Where a piece of the gradient goes: into its row, past the caches where the gradient is large, or into the two sums
// of a logistic row.
#pragma once
#include "mixture.h"

namespace di4c::cpu::DI4C_ISA {

// What goes past the caches goes by whole lines: one that a piece begins waits for the next piece, of the same row or
// of the next position's, which lies right behind. Half a line stored as usual would first be read from memory, and
// all that is stored after it would wait for that.
struct GradientWriter {
  static constexpr int64_t kStreamBytes = 16 << 20;  // a gradient from this size on is written past the caches
  static constexpr int64_t kLine = 64;

  // A row of the gradient, of component l. `followed`: the next position's rows are written next.
  struct Place {
    char* row;
    int64_t l;
    bool followed;
  };

  const MixtureBackwardArgs& args;
  const DType dtype;
  const bool past;

  // `most`: elements of a piece.
  GradientWriter(const MixtureBackwardArgs& x, Arena& arena, int64_t most)
      : args(x), dtype(x.logits.dtype),
        past(dtype != kLogistic && x.grad != x.logits.data &&
             x.B * x.L * x.D * row_bytes(dtype, x.S) >= kStreamBytes),
        floats(arena.take<float>(most + kLine / 4)),
        halves(arena.take<uint16_t>(past && dtype != kFloat32 ? most + kLine / 2 : 0)),
        held(arena.take<char>(past ? x.L * kLine : 0)), begun(arena.take<char*>(past ? x.L : 0)) {}

  // Before the first position of a run.
  void start() const {
    for (int64_t l = 0; l < args.L && past; ++l) begun[l] = nullptr;
  }

  Place place(int64_t b, int64_t l, int64_t d, bool followed) const {
    return {grad_row(args.grad, dtype, (b * args.L + l) * args.D + d, args.S), l, followed};
  }

  // Where elements from `start` on are to be computed.
  float* piece(const Place& to, int64_t start) const {
    float* room = floats + kLine / 4;
    return past ? room : write_target(to.row, dtype, start, room);
  }

  // Brings elements [start, start + n) of a row, computed where piece() said, to where they belong.
  void put(const Place& to, const Row& logits, int64_t start, int n, float* piece, LogisticSum& head) const {
    if (dtype == kLogistic) return logistic_pull(logits, start, n, piece, head);
    if (!past) return write(to.row, dtype, start, n, piece);
    char* from = reinterpret_cast<char*>(piece);
    if (dtype != kFloat32) write(from = reinterpret_cast<char*>(halves + kLine / 2), dtype, 0, n, piece);
    copy_past(to, row_bytes(dtype, start), from, row_bytes(dtype, n));
  }

  // The two numbers of a logistic row whose pieces have all been put.
  void close(const Place& to, const LogisticSum& head) const {
    if (dtype != kLogistic) return;
    float* grad = reinterpret_cast<float*>(to.row);
    grad[0] = static_cast<float>(head.mean);
    grad[1] = static_cast<float>(head.log_scale);
  }

  // Fills a row with zeros.
  void zero(const Place& to) const {
    if (past && begun[to.l]) {
      const int64_t bytes = to.row - begun[to.l];
      memcpy(begun[to.l], held + (to.l + 1) * kLine - bytes, static_cast<size_t>(bytes));
      begun[to.l] = nullptr;
    }
    memset(to.row, 0, static_cast<size_t>(row_bytes(dtype, args.S)));
  }

 private:
  float* floats;     // a piece, with room for a line before it
  uint16_t* halves;  // the same, rounded
  char* held;        // (L, kLine): the last line's worth of bytes of each row's last piece
  char** begun;      // (L): the line in memory that their end begins, null where it begins none

  // Bytes [start, start + bytes) of a row, from where there is room for a line before them.
  void copy_past(const Place& place, int64_t start, char* from, int64_t bytes) const {
    const int64_t size = sizeof(f32);
    char *to = place.row + start, *kept = held + place.l * kLine;
    char*& line = begun[place.l];
    const int64_t gap = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % kLine);
    int64_t i = -gap;
    if (gap > 0 && line == to - gap) {
      memcpy(from - kLine, kept, kLine);
    } else if (gap > 0) {  // the line is another's, too
      i = kLine - gap < bytes ? kLine - gap : bytes;
      memcpy(to, from, static_cast<size_t>(i));
    }
    line = nullptr;
    for (; i + kLine <= bytes; i += kLine)
      for (int64_t j = i; j < i + kLine; j += size) {
        f32 v;
        memcpy(&v, from + j, sizeof v);
        stream(to + j, v);
      }
    if (i >= bytes) return;
    if (!place.followed && start + bytes == row_bytes(dtype, args.S)) {
      memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
    } else {
      memcpy(kept, from + bytes - kLine, kLine);
      line = to + i;
    }
  }
};

}  // namespace di4c::cpu::DI4C_ISA
