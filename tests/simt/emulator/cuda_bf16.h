// The toolkit's bfloat16, as far as the kernels use it: the upper half of a float, rounded to nearest even.
#pragma once
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t word = uint32_t{v.bits} << 16;
  float result;
  memcpy(&result, &word, sizeof result);
  return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  uint32_t word;
  memcpy(&word, &v, sizeof word);
  if (v != v) return {0x7fff};
  return {static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16)};
}
