// Positions whose rows are short (S <= kShort): a latent to a lane. The rows of a position lie in a table (S, wide),
// wide their count padded to kLanes, so that what is wanted of every row is one vector operation a state, and a token's
// log-probabilities under all rows are one line of it. Everything goes through logarithms: the table is small.
#pragma once
#include "mixture.h"

namespace di4c::cpu::DI4C_ISA {

constexpr int64_t kShort = 64;

// From the shapes alone. Wider tables than twice the rows' own vectors are not worth it.
template <typename Args>
static inline bool is_short(const Args& x) {
  const bool computed = x.logits.dtype == kLogistic || (x.T > 0 && x.target.dtype == kLogistic) ||
                        (x.teacher.data && x.teacher.dtype == kLogistic);
  return !computed && x.S <= kShort && x.S * padded(x.L) <= 2 * x.L * padded(x.S);
}

// The rows of one position. Lanes beyond the last row hold no probability.
struct ShortRows {
  int64_t count, wide, S;
  float *max, *log_sum;  // (wide)
  double* exact;         // (wide): log_sum before it is rounded
  float *x, *e;          // (S, wide): logits; exp(log p - top)
  double* log_p;         // (S, wide)
  double* top;           // (S): largest log p of the state, -inf where no row has it
  float* sum;            // (padded S): of e
  double* exact_mean;    // (padded S): log mean_l p, -inf where no row has the state
  float* log_mean;       // (padded S): the same, rounded; -inf beyond S
  bool bad;              // a row is no distribution

  // `whole`: its shares are wanted, not its mean alone.
  ShortRows(Arena& arena, int64_t rows, int64_t states, bool whole)
      : count(rows), wide(rows > 1 || (whole && rows > 0) ? padded(rows) : 0), S(states),
        max(arena.take<float>(padded(rows))), log_sum(arena.take<float>(padded(rows))),
        exact(arena.take<double>(padded(rows))), x(arena.take<float>(S * wide)),
        e(arena.take<float>(S * wide)), log_p(arena.take<double>(S * wide)), top(arena.take<double>(padded(S))),
        sum(arena.take<float>(padded(S))),
        exact_mean(arena.take<double>(padded(S))), log_mean(arena.take<float>(padded(S))), bad(false) {}

  // A row alone lies with its states in the lanes, in `log_mean`, and has no table.
  bool alone() const { return wide == 0; }

  void read_rows(const Logits& logits, int64_t b, int64_t d) const {
    float buffer[kShort];
    if (alone()) {
      const float* row = read(row_at(logits, S, b, 0, d), 0, static_cast<int>(S), buffer);
      for (int64_t s = 0; s < padded(S); ++s) log_mean[s] = s < S ? row[s] : -kInf;
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      const float* row = read(row_at(logits, S, b, i, d), 0, static_cast<int>(S), buffer);
      for (int64_t s = 0; s < S; ++s) x[s * wide + i] = row[s];
    }
    for (int64_t s = 0; s < S; ++s)
      for (int64_t i = count; i < wide; ++i) x[s * wide + i] = 0;
  }

  void normalise() {
    if (alone()) {
      const int n = static_cast<int>(S);
      max[0] = max_of(log_mean, n);
      const double total = sum_exp(log_mean, n, max[0]);
      exact[0] = total > 0 ? log_from_one(set(total))[0] : __builtin_nan("");
      log_sum[0] = static_cast<float>(exact[0]);
      return close();
    }
    for (int64_t i = 0; i < wide; i += W) {
      f32 m = load(x + i), total = {};
      for (int64_t s = 1; s < S; ++s) m = ::di4c::cpu::DI4C_ISA::max(load(x + s * wide + i), m);
      const f32 shift = m == -kInf ? f32{} : m;
      for (int64_t s = 0; s < S; ++s) total += exp_nonpos(load(x + s * wide + i) - shift);
      store(max + i, m);
      for (int h = 0; h < 2; ++h) {
        const f64 wider = widen(total, h);
        store(exact + i + h * W / 2, wider > 0.0 ? log_from_one(wider) : set(__builtin_nan("")));
      }
    }
    for (int64_t i = 0; i < count; ++i) log_sum[i] = static_cast<float>(exact[i]);
    close();
  }

  void recall(const Lines& planes, int64_t at) {
    for (int64_t i = 0; i < count; ++i) {
      max[i] = planes.at(i, at);
      exact[i] = log_sum[i] = planes.at(count + i, at);
    }
    close();
  }

  void keep_all(const Lines& planes, int64_t at) const {
    for (int64_t i = 0; i < count; ++i) planes.at(i, at) = max[i], planes.at(count + i, at) = log_sum[i];
  }

  // For every state the largest log p, the exponentials relative to it, their sum and the log of their mean: exactly,
  // with log p kept, for what is added up over thousands of positions, or in floats.
  void shares() const {
    if (alone()) return finish_alone();
    for (int64_t s = 0; s < S; ++s) {
      double* line = log_p + s * wide;
      f64 most = set(-static_cast<double>(kInf));
      for (int64_t i = 0; i < wide; i += W) {
        const f32 v = load(x + s * wide + i);
        for (int h = 0; h < 2; ++h) {
          const int64_t at = i + h * W / 2;
          const f64 now = (widen(v, h) - widen(load(max + i), h)) - load(exact + at);
          store(line + at, now);
          most = now > most ? now : most;
        }
      }
      top[s] = most[0];
      for (int i = 1; i < W / 2; ++i) top[s] = most[i] > top[s] ? most[i] : top[s];
      const double shift = top[s] == -static_cast<double>(kInf) ? 0 : top[s];
      add_up(s, DI4C_EACH(int64_t i) { return narrow(load(line + i) - shift, load(line + i + W / 2) - shift); });
    }
    find_means();
  }

  void rough_shares() const {
    if (alone()) return finish_alone();
    for (int64_t s = 0; s < S; ++s) {
      float* line = x + s * wide;
      f32 most = set(-kInf);
      for (int64_t i = 0; i < wide; i += W) {
        const f32 now = load(line + i) - load(max + i) - load(log_sum + i);
        store(line + i, now);
        most = ::di4c::cpu::DI4C_ISA::max(now, most);
      }
      const float found = max_lanes(most), shift = found == -kInf ? 0 : found;
      top[s] = found;
      add_up(s, DI4C_EACH(int64_t i) { return load(line + i) - shift; });
    }
    find_means();
  }

 private:
  void finish_alone() const {
    for (int64_t s = 0; s < padded(S); s += W) store(log_mean + s, load(log_mean + s) - max[0] - log_sum[0]);
  }

  template <typename F>
  void add_up(int64_t s, const F& relative) const {
    f32 total[U] = {};
    for (int64_t i = 0; i < wide; i += W) {
      const f32 share = exp_nonpos(relative(i));
      store(e + s * wide + i, share);
      total[i / W % U] += share;
    }
    sum[s] = bad ? kNan : sum_block(total);
  }

  void find_means() const {
    const f64 none = set(-static_cast<double>(kInf)), log_count = set(::log(static_cast<double>(count)));
    for (int64_t s = S; s < padded(S); ++s) sum[s] = 0, top[s] = 0;
    for (int64_t s = 0; s < S; s += W) {
      f64 mean[2];
      for (int h = 0; h < 2; ++h) {
        const f64 total = widen(load(sum + s), h);
        mean[h] = total == 0.0 ? none : load(top + s + h * W / 2) + (log_from_one(total) - log_count);
        store(exact_mean + s + h * W / 2, mean[h]);
      }
      store(log_mean + s, narrow(mean[0], mean[1]));
    }
    for (int64_t s = ceil_div(S, W) * W; s < padded(S); ++s) log_mean[s] = -kInf;
  }

  void close() {
    bad = false;
    for (int64_t i = 0; i < count; ++i) bad = bad || log_sum[i] != log_sum[i];
    for (int64_t i = count; i < wide; ++i) max[i] = kInf, log_sum[i] = 0, exact[i] = 0;
  }
};

}  // namespace di4c::cpu::DI4C_ISA
