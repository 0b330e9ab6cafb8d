// Philox4x32-10 (Salmon et al., SC 2011): a counter-based generator, a pure function of key and counter.
//
// The one use of it here: 128 bits for (sample key, position, draw, stream). The counter is
//   word 0, 1: position within the sample, low and high half
//   word 2:    number of the draw
//   word 3:    stream, whose lowest bit tells a coin (1) from a token (0)
// No state, no global generator: a batch of 64 draws what 64 batches of 1 draw, on any device.
#pragma once
#include "di4c/config.h"

namespace di4c {

struct Bits128 {
  uint64_t a, b;
};

DI4C_FN Bits128 philox(uint64_t key, uint64_t position, uint32_t draw, uint32_t stream) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32), c2 = draw, c3 = stream;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {uint64_t{c1} << 32 | c0, uint64_t{c3} << 32 | c2};
}

constexpr uint32_t kToken = 0, kCoin = 1;
DI4C_FN uint32_t stream_word(uint32_t stream, uint32_t use) { return stream << 1 | use; }

// Uniform on the multiples of 2^-53 in [0, 1); exact, so that a coin falls alike everywhere.
DI4C_FN double unit_double(uint64_t bits) { return static_cast<double>(bits >> 11) * 0x1p-53; }

// floor(bits * total / 2^64): uniform on [0, total) to within total / 2^64.
DI4C_FN uint64_t below(uint64_t bits, uint64_t total) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(bits, total);
#else
  return static_cast<uint64_t>(static_cast<unsigned __int128>(bits) * total >> 64);
#endif
}

}  // namespace di4c
