// Random bits, categorical draws and the absorbing step. One pass over a row whatever the number of draws: each chunk's
// maximum and sum of exponentials, then integers alone decide (masses.h); a second look falls on chosen chunks only.
#include "di4c/masses.h"
#include "kernels.h"
#include "rows.h"

namespace di4c::cpu::DI4C_ISA {
namespace {

constexpr int kSub = 64, kSubs = kChunk / kSub;  // a chunk's masses are searched by pieces of kSub
constexpr int kDrawGroup = 64;                   // draws that share the second look at a chunk

struct Scratch {
  float x[kChunk];         // a chunk as floats, tempered
  uint64_t q[kChunk];      // class masses; in pieces already searched, their prefix sums
  uint64_t piece[kSubs];   // masses of the pieces
  uint32_t summed;         // bit p: piece p of q holds prefix sums
  float chunk_max[kMaxChunks];
  float chunk_sum[kMaxChunks];
  uint64_t below[kMaxChunks];  // masses up to and with this chunk
  int chosen[kDrawGroup];
  uint64_t class_bits[kDrawGroup];
};

struct Sampler {
  Row row;
  int64_t chunks, excluded;  // excluded: the class never drawn, -1 for none
  float inverse_temperature;
  Scratch& s;
  float row_max = -kInf;
  double total = 0;      // of the chunks' values: sum exp(x - row_max)
  double log_total = 0;
  int64_t at_hand = -1;  // the chunk that chunk() gave last, and what it gave
  const float* x_at_hand = nullptr;

  int size(int64_t c) const { return min_int(row.S - c * kChunk, kChunk); }

  // Chunk c, tempered and without the excluded class; in place where nothing is to be done.
  const float* chunk(int64_t c) {
    if (c == at_hand) return x_at_hand;
    const int n = size(c);
    const float* x = read(row, c * kChunk, n, s.x);
    if (inverse_temperature != 1.0f) {
      each(x, n, 0.0f, DI4C_EACH(int, int i, int, f32 v) { store(s.x + i, v * inverse_temperature); });
      x = s.x;
    }
    if (excluded / kChunk == c && excluded >= 0) {
      if (x != s.x) memcpy(s.x, x, sizeof(float) * static_cast<size_t>(n));
      s.x[excluded % kChunk] = -kInf;
      x = s.x;
    }
    at_hand = c;
    x_at_hand = x;
    return x;
  }

  // The one pass. Returns kBadRow, the first class at +inf, or kMany: the masses decide.
  static constexpr int64_t kMany = -2;
  int64_t scan() {
    bool bad = false, infinite = false;
    for (int64_t c = 0; c < chunks; ++c) {
      const int n = size(c);
      const float* x = chunk(c);
      const float m = max_of(x, n), sum = sum_exp(x, n, m);
      s.chunk_max[c] = m;
      s.chunk_sum[c] = sum;
      if (m > row_max) row_max = m;
      if (sum != sum) {  // +inf - +inf is NaN too
        bool nan = false;
        for (int i = 0; i < n; ++i) nan |= x[i] != x[i];
        bad |= nan;
        infinite |= !nan;
      }
    }
    if (bad || row_max == -kInf) return kBadRow;
    if (infinite) return first_equal(kInf);
    double scale;
    total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += value(c);
    scale = chunk_scale(total);
    uint64_t sum = 0;
    for (int64_t c = 0; c < chunks; ++c) s.below[c] = sum += chunk_mass(value(c), scale);
    return kMany;
  }

  double value(int64_t c) const {
    return s.chunk_sum[c] > 0 ? chunk_value(s.chunk_sum[c], s.chunk_max[c], row_max) : 0.0;
  }

  // Temperature 0: the first of the largest, kBadRow for a bad row.
  int64_t argmax() {
    for (int64_t c = 0; c < chunks; ++c) {
      const int n = size(c);
      const float* x = chunk(c);
      s.chunk_max[c] = max_of(x, n);
      f32 odd = {};  // stays 0 unless a NaN comes by
      each(x, n, 0.0f, DI4C_EACH(int, int, int, f32 v) { odd += v == v ? f32{} : v; });
      if (sum_lanes(odd) != 0.0f) return kBadRow;
      if (s.chunk_max[c] > row_max) row_max = s.chunk_max[c];
    }
    return row_max == -kInf ? kBadRow : first_equal(row_max);
  }

  int64_t first_equal(float wanted) {
    for (int64_t c = 0;; ++c) {
      if (s.chunk_max[c] != wanted) continue;
      const float* x = chunk(c);
      for (int i = 0;; ++i)
        if (x[i] == wanted) return c * kChunk + i;
    }
  }

  int pick_chunk(uint64_t bits) const {
    int c = 0;
    if (chunks == 1) return c;
    const uint64_t r = di4c::below(bits, s.below[chunks - 1]);
    while (s.below[c] <= r) ++c;
    return c;
  }

  // Prepares draws from chunk c: class_mass of every class and their sums by pieces. (The product with 2^53 is exact.)
  const float* open(int64_t c) {
    const int n = size(c);
    const float* x = chunk(c);
    const f32 m = set(s.chunk_max[c]);
    each(x, n, -kInf, DI4C_EACH(int, int i, int, f32 v) { store_integers(s.q + i, exp_nonpos(v - m) * 0x1p53f); });
    for (int p = 0; p * kSub < n; ++p) {
      const int end = min_int(n, (p + 1) * kSub);
      uint64_t sum = 0;
      for (int i = p * kSub; i < end; ++i) sum += s.q[i];
      s.piece[p] = sum;
    }
    s.summed = 0;
    return x;
  }

  int pick_class(uint64_t bits, int n) {
    uint64_t sum = 0;
    for (int p = 0; p * kSub < n; ++p) sum += s.piece[p];
    uint64_t r = di4c::below(bits, sum);
    int p = 0;
    for (; r >= s.piece[p]; ++p) r -= s.piece[p];
    const int start = p * kSub, end = min_int(n, start + kSub);
    if (!(s.summed >> p & 1)) {
      for (int i = start + 1; i < end; ++i) s.q[i] += s.q[i - 1];
      s.summed |= 1u << p;
    }
    int i = start;
    for (int j = start; j < end; ++j) i += s.q[j] <= r;
    return i;
  }

  float log_prob(float x) {
    if (log_total == 0 && total != 1) log_total = ::log(total);
    return static_cast<float>(static_cast<double>(x) - static_cast<double>(row_max) - log_total);
  }
};

// All draws of position (b, d).
void sample_row(const SampleArgs& a, int64_t b, int64_t d, Scratch& scratch) {
  const uint64_t key = static_cast<uint64_t>(a.keys[b]), position = static_cast<uint64_t>(a.first + d);
  const auto at = [&](int64_t draw) { return (b * a.draws + draw) * a.D + d; };
  const auto put = [&](int64_t draw, int64_t token, float log_prob) {
    a.tokens[at(draw)] = token;
    if (a.log_prob) a.log_prob[at(draw)] = log_prob;
  };
  const auto wanted = [&](int64_t draw) {
    const uint32_t word = stream_word(a.stream, kCoin);
    return !a.x_t || unit_double(philox(key, position, static_cast<uint32_t>(draw), word).a) < a.unmask_prob[b];
  };

  Sampler sampler{row_at(a.logits, a.S, b, 0, d), ceil_div(a.S, kChunk), a.mask_id < a.S ? a.mask_id : -1,
                  a.temperature > 0 ? 1.0f / a.temperature : 1.0f, scratch};
  const bool open = !a.x_t || a.x_t[b * a.D + d] == a.mask_id;
  bool scanned = false;
  int64_t fixed = Sampler::kMany;
  for (int64_t first = 0; first < a.draws; first += kDrawGroup) {
    const int count = min_int(a.draws - first, kDrawGroup);
    for (int j = 0; j < count; ++j) {
      const int64_t draw = first + j;
      scratch.chosen[j] = -1;
      if (!open || !wanted(draw)) {
        put(draw, a.x_t[b * a.D + d], 0.0f);
        continue;
      }
      if (!scanned) {
        fixed = a.temperature > 0 ? sampler.scan() : sampler.argmax();
        scanned = true;
      }
      if (fixed != Sampler::kMany) {
        put(draw, fixed, fixed == kBadRow ? kNan : 0.0f);
        continue;
      }
      const Bits128 bits = philox(key, position, static_cast<uint32_t>(draw), stream_word(a.stream, kToken));
      scratch.chosen[j] = sampler.pick_chunk(bits.a);
      scratch.class_bits[j] = bits.b;
    }
    for (int j = 0; j < count; ++j) {
      const int c = scratch.chosen[j];
      if (c < 0) continue;
      const float* x = sampler.open(c);
      for (int k = j; k < count; ++k) {
        if (scratch.chosen[k] != c) continue;
        scratch.chosen[k] = -1;
        const int i = sampler.pick_class(scratch.class_bits[k], sampler.size(c));
        put(first + k, int64_t{c} * kChunk + i, a.log_prob ? sampler.log_prob(x[i]) : 0.0f);
      }
    }
  }
}

}  // namespace

void random_bits(const RandomBitsArgs& a, int threads) {
  constexpr int64_t kGrain = 4096;
  const int64_t total = a.B * a.N;
  parallel(ceil_div(total, kGrain), threads, total, 0, [&](int64_t task, void*) {
    const int64_t end = (task + 1) * kGrain < total ? (task + 1) * kGrain : total;
    for (int64_t i = task * kGrain; i < end; ++i) {
      const Bits128 bits = philox(static_cast<uint64_t>(a.keys[i / a.N]), static_cast<uint64_t>(i % a.N), 0, a.stream);
      a.out[2 * i] = static_cast<int64_t>(bits.a);
      a.out[2 * i + 1] = static_cast<int64_t>(bits.b);
    }
  });
}

void sample(const SampleArgs& a, int threads) {
  if (a.S <= 0 || a.draws <= 0) return;
  const int64_t rows = a.B * a.D, grain = 1 + (1 << 14) / (a.S + 64 * a.draws);
  const int64_t elements = rows * (a.S + 64 * a.draws);
  parallel(ceil_div(rows, grain), threads, elements, sizeof(Scratch), [&](int64_t task, void* scratch) {
    const int64_t end = (task + 1) * grain < rows ? (task + 1) * grain : rows;
    for (int64_t i = task * grain; i < end; ++i) sample_row(a, i / a.D, i % a.D, *static_cast<Scratch*>(scratch));
  });
}

}  // namespace di4c::cpu::DI4C_ISA
