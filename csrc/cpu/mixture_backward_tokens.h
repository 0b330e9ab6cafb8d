// The gradient where sequences alone ask for one, so that a class's L probabilities need not know of each other:
//   dlogits_ls = p_l(s) A_l + sum_k coefficient_lk [s = x_k],   A_l = -sum_k coefficient_lk
// A position's tokens are gathered from all its rows, and then the rows are read and written one after the other.
#pragma once
#include "mixture_tokens.h"
#include "mixture_writer.h"

namespace di4c::cpu::DI4C_ISA {

struct TokensBackward {
  const MixtureBackwardArgs& args;
  const int64_t S, L;
  const DType dtype;
  const int columns, strips;  // strips of so many columns are written one after the other
  Rows logits;
  Tokens tokens;
  GradientWriter writer;
  float *slope, *buffer;   // (L): A_l; (columns)
  int64_t *first, *order;  // tokens by strip: (strips + 1), (K)

  TokensBackward(const MixtureBackwardArgs& x, Arena& arena)
      : args(x), S(x.S), L(x.L), dtype(x.logits.dtype), columns(static_cast<int>(even_piece(S, kChunk))),
        strips(static_cast<int>(ceil_div(S, columns))), logits(arena, L), tokens(arena, L, x.K),
        writer(x, arena, columns), slope(arena.take<float>(L)), buffer(arena.take<float>(columns)),
        first(arena.take<int64_t>(strips + 1)), order(arena.take<int64_t>(x.K)) {}

  // Positions d .. d + n of sample b, whose lines are there.
  void block(int64_t b, int64_t d, int64_t n, const KeptLines& lines) {
    writer.start();
    for (int64_t at = 0; at < n; ++at) position(b, d + at, at, at + 1 < n, lines);
  }

 private:
  // `followed`: by the next position.
  void position(int64_t b, int64_t d, int64_t at, bool followed, const KeptLines& lines) {
    const float w = weight_at(args.weight, b * args.D + d);
    for (int64_t l = 0; l < L && w == 0; ++l) writer.zero(writer.place(b, l, d, followed));
    if (w == 0) return;
    logits.find(args.logits, S, b, d);
    logits.recall(lines.lse, at);
    for (int64_t l = 0; l < L; ++l) slope[l] = 0;
    if (args.K > 0) {
      tokens.find(args, b, d);
      for (int64_t l = 0; l < L; ++l) tokens.gather(l, logits.row[l], nullptr);
      tokens.weigh(args, b, w, logits.norm, slope);
      tokens.deal(columns, strips, first, order);
    }
    const bool more = d + 1 < args.D && weight_at(args.weight, b * args.D + d + 1) != 0;
    for (int64_t l = 0; l < L; ++l)
      write_row(writer.place(b, l, d, followed), more ? soon(logits.row[l], args.logits.stride_d) : Soon{});
  }

  // `next`: what is read of the next position.
  void write_row(const GradientWriter::Place& place, Soon next) const {
    const int64_t l = place.l;
    const Norm norm = logits.norm[l];
    const f32 by = set(slope[l]);
    LogisticSum head{};
    for (int strip = 0; strip < strips; ++strip) {
      const int64_t start = static_cast<int64_t>(strip) * columns;
      const int n = min_int(S - start, columns);
      float* piece = writer.piece(place, start);
      const Soon ask = strip + 1 < strips ? soon(logits.row[l], start + columns) : next;
      each(read(logits.row[l], start, n, buffer), n, -kInf, DI4C_EACH(int, int i, int count, f32 v) {
        ask(i);
        store(piece + i, count, by * exp_nonpos(v - norm.max - norm.log_sum));
      });
      if (args.K > 0) tokens.add(first[strip], first[strip + 1], order, tokens.x + l * tokens.Kp, start, piece);
      writer.put(place, logits.row[l], start, n, piece, head);
    }
    writer.close(place, head);
  }
};

}  // namespace di4c::cpu::DI4C_ISA
