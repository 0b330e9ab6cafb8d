// Draws of classes in proportion to the product of two tables' rows (product.h).
#include "di4c/product.h"

#include "kernels.h"
#include "rows.h"

namespace di4c::cpu::DI4C_ISA {
namespace {

typedef int64_t i64 __attribute__((vector_size(4 * W)));

constexpr int kWide = W / 2;   // doubles of a vector
constexpr int kPiece = kLanes;  // masses are searched by pieces of so many

static inline u64 load_bits(const uint64_t* p) {
  u64 v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline void store_bits(uint64_t* p, u64 v) { memcpy(p, &v, sizeof v); }

struct Product {
  const double *left, *right;
  double base;
  int64_t S;
  uint64_t* q;      // S rounded up to kPiece: bits of the products, then masses
  uint64_t* piece;  // sums of the masses, kPiece by kPiece

  int64_t pieces() const { return ceil_div(S, kPiece); }

  // The products' bits into q; false where they allow no draw.
  bool multiply(uint64_t& top) {
    i64 most = {};
    u64 all = {};
    uint64_t seen = 0;
    int64_t s = 0;
    top = 0;
    for (; s + kWide <= S; s += kWide) {
      const u64 bits = (u64)(load(left + s) * load(right + s) + base);
      most = (i64)bits > most ? (i64)bits : most;
      all |= bits;
      store_bits(q + s, bits);
    }
    for (; s < S; ++s) {
      q[s] = product_bits(left[s], right[s], base);
      top = q[s] > top ? q[s] : top;
      seen |= q[s];
    }
    for (; s < pieces() * kPiece; ++s) q[s] = 0;
    for (int i = 0; i < kWide; ++i) {
      if (most[i] > static_cast<int64_t>(top)) top = static_cast<uint64_t>(most[i]);
      seen |= all[i];
    }
    return !bad_product(top, seen);
  }

  // Bits to masses, their sums by pieces and the sum of these.
  uint64_t weigh(uint64_t top) {
    const ProductScale scale = product_scale(top, S);
    uint64_t total = 0;
    for (int64_t p = 0; p < pieces(); ++p) {
      u64 sum = {};
      for (int i = 0; i < kPiece; i += kWide) {
        const u64 bits = load_bits(q + p * kPiece + i), field = bits >> 52;
        const u64 normal = (u64)(field != 0) & 1u;  // a comparison gives all ones
        const u64 digits = (bits & ((uint64_t{1} << 52) - 1)) | normal << 52;
        const i64 shift = scale.down - (i64)(field + (1u - normal));
        const u64 mass = (digits << static_cast<uint64_t>(scale.up)) >> (u64)(shift > 63 ? i64{} + 63 : shift);
        store_bits(q + p * kPiece + i, mass);
        sum += mass;
      }
      uint64_t lanes = 0;
      for (int i = 0; i < kWide; ++i) lanes += sum[i];
      piece[p] = lanes;
      total += lanes;
    }
    return total;
  }

  // The class with r in its share of the masses, r < their sum.
  int64_t find(uint64_t r) const {
    int64_t p = 0;
    for (; r >= piece[p]; ++p) r -= piece[p];
    int64_t s = p * kPiece;
    for (; r >= q[s]; ++s) r -= q[s];
    return s;
  }
};

}  // namespace

void sample_product(const ProductArgs& a, int threads) {
  if (a.S <= 0) return;
  const int64_t rows = a.B * a.draws * a.D, grain = 1 + (1 << 14) / a.S, pieces = ceil_div(a.S, kPiece);
  const size_t scratch_bytes = static_cast<size_t>(pieces * (kPiece + 1)) * sizeof(uint64_t);
  parallel(ceil_div(rows, grain), threads, rows * a.S, scratch_bytes, [&](int64_t task, void* scratch) {
    uint64_t* q = static_cast<uint64_t*>(scratch);
    const int64_t end = (task + 1) * grain < rows ? (task + 1) * grain : rows;
    for (int64_t k = task * grain; k < end; ++k) {
      const int64_t d = k % a.D, draw = k / a.D % a.draws, b = k / a.D / a.draws;
      const int64_t i = a.i[b * a.D + d], j = a.j[k];
      a.tokens[k] = kBadRow;
      if (i < 0 || i >= a.S || j < 0 || j >= a.S) continue;
      const int64_t table = (a.N == 1 ? 0 : b) * a.S;
      const double base = a.base ? a.base[(table + i) * a.S + j] : 0.0;
      Product product{a.left + (table + i) * a.S, a.right + (table + j) * a.S, base, a.S, q, q + pieces * kPiece};
      uint64_t top;
      if (!product.multiply(top)) continue;
      const uint64_t total = product.weigh(top);
      const Bits128 bits = philox(static_cast<uint64_t>(a.keys[b]), static_cast<uint64_t>(d),
                                  static_cast<uint32_t>(draw), stream_word(a.stream, kCoin));
      a.tokens[k] = product.find(below(bits.a, total));
    }
  });
}

}  // namespace di4c::cpu::DI4C_ISA
