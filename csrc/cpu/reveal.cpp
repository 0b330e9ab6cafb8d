// Select and reveal (reveal.h): a sequence at a time, its candidates' orders side by side, the least of those revealed
// found among fewer and fewer of them.
#include "di4c/reveal.h"

#include "kernels.h"
#include "rows.h"

namespace di4c::cpu::DI4C_ISA {
namespace {

// The `wanted`-th largest of n different orders, 1 <= wanted <= n, or any number between it and the next smaller one.
uint64_t least_revealed(uint64_t* order, int64_t n, int64_t wanted) {
  uint64_t known = 0;  // the digits that all of `order` begin with
  for (int shift = kOrderBits - kDigitBits; wanted < n; shift -= kDigitBits) {
    int64_t count[kDigits] = {};
    for (int64_t i = 0; i < n; ++i) ++count[order[i] >> shift & (kDigits - 1)];
    uint64_t digit = kDigits - 1;
    for (; wanted > count[digit]; --digit) wanted -= count[digit];
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i)
      if ((order[i] >> shift & (kDigits - 1)) == digit) order[kept++] = order[i];
    n = kept;
    known |= digit << shift;
  }
  return known;
}

// Sequence k = (b, draw).
void reveal_sequence(const RevealArgs& a, int64_t k, uint64_t* order) {
  const int64_t b = k / a.draws, draw = k % a.draws, at = k * a.D;
  const int64_t* x_t = a.x_t + b * a.D;
  const uint32_t word = stream_word(a.stream, kCoin);
  int64_t n = 0;
  for (int64_t d = 0; d < a.D; ++d) {
    a.x_s[at + d] = x_t[d];
    if (x_t[d] != a.mask_id) continue;
    const Bits128 bits = philox(static_cast<uint64_t>(a.keys[b]), static_cast<uint64_t>(d),
                                static_cast<uint32_t>(draw), word);
    const uint32_t confidence =
        a.tokens[at + d] < 0 ? 0 : confidence_order(a.log_prob[at + d], a.noise[b], bits.a);
    if (confidence == 0) {
      a.x_s[at + d] = kBadToken;
    } else {
      order[n++] = reveal_order(confidence, d);
    }
  }
  const int64_t wanted = a.count[b] < n ? a.count[b] : n;
  if (wanted <= 0) return;
  uint64_t* chosen = order + n;  // room to search in: the orders themselves say who is revealed
  memcpy(chosen, order, static_cast<size_t>(n) * sizeof(uint64_t));
  const uint64_t least = least_revealed(chosen, n, wanted);
  for (int64_t i = 0; i < n; ++i) {
    if (order[i] < least) continue;
    const int64_t d = static_cast<uint32_t>(~order[i]);
    a.x_s[at + d] = a.tokens[at + d];
  }
}

}  // namespace

void reveal(const RevealArgs& a, int threads) {
  constexpr int64_t kWorkOfPosition = 64;  // beside that of an element of a row
  const size_t scratch_bytes = 2 * static_cast<size_t>(a.D) * sizeof(uint64_t);
  parallel(a.B * a.draws, threads, a.B * a.draws * a.D * kWorkOfPosition, scratch_bytes,
           [&](int64_t k, void* scratch) { reveal_sequence(a, k, static_cast<uint64_t*>(scratch)); });
}

}  // namespace di4c::cpu::DI4C_ISA
