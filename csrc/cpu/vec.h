// Vectors of W floats for the instruction set this file is compiled for, inside that set's own namespace.
//
// Arithmetic is the compiler's vector extension; what it lacks (fma, half floats, partial loads, sums across lanes)
// is one intrinsic per set. Loops run over blocks of kLanes = 32 elements, U vectors each, whatever W is: element i
// is always added in virtual lane i mod 32 and lanes are always folded by halves, so every set with an fma
// gives the same bits. Nothing here may be a shared inline or template of the standard library: the linker would
// keep one copy for all sets (config.h).
#pragma once
#include <cstdint>
#include <cstring>

#include "di4c/log.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef DI4C_ISA
#error "DI4C_ISA names the namespace of the instruction set compiled for"
#endif

namespace di4c::cpu::DI4C_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int kLanes = 32, U = kLanes / W;

typedef float f32 __attribute__((vector_size(4 * W)));
typedef int32_t i32 __attribute__((vector_size(4 * W)));
typedef uint32_t u32 __attribute__((vector_size(4 * W)));
typedef uint16_t u16 __attribute__((vector_size(2 * W)));
typedef double f64 __attribute__((vector_size(4 * W)));  // W / 2 lanes
typedef uint64_t u64 __attribute__((vector_size(4 * W)));

constexpr float kInf = __builtin_inff();
constexpr float kNan = __builtin_nanf("");

static inline f32 set(float x) { return f32{} + x; }
// A C cast between vectors keeps the bits.
static inline f32 bits_to_float(u32 x) { return (f32)x; }
static inline u32 float_to_bits(f32 x) { return (u32)x; }

// a b + c, rounded once where the set has an fma.
static inline f32 fma(f32 a, f32 b, f32 c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// The larger; which of the two where one is NaN is left open.
static inline f32 max(f32 a, f32 b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#elif defined(__aarch64__)
  return vmaxq_f32(a, b);
#else
  return a > b ? a : b;
#endif
}

static inline f64 set(double x) { return f64{} + x; }

static inline f64 fma(f64 a, f64 b, f64 c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

static inline f32 abs(f32 x) { return bits_to_float(float_to_bits(x) & 0x7fffffffu); }

// --- memory ---------------------------------------------------------------------------------------------------

static inline f32 load(const float* p) {
  f32 v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, f32 v) { memcpy(p, &v, sizeof v); }

// The first n elements, or all W of them if there are more; `fill` in the other lanes. Nothing past p[n-1] is touched.
static inline f32 load(const float* p, int n, float fill) {
#if defined(__AVX512F__)
  const __mmask16 some = static_cast<__mmask16>(n < W ? (1u << n) - 1 : 0xffffu);
  return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), some, p);
#else
  if (n >= W) return load(p);
  float v[W];
  for (int i = 0; i < W; ++i) v[i] = i < n ? p[i] : fill;
  return load(v);
#endif
}

static inline void store(float* p, int n, f32 v) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(n < W ? (1u << n) - 1 : 0xffffu), v);
#else
  if (n >= W) return store(p, v);
  float lane[W];
  store(lane, v);
  for (int i = 0; i < n; ++i) p[i] = lane[i];
#endif
}

static inline f64 load(const double* p) {
  f64 v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(double* p, f64 v) { memcpy(p, &v, sizeof v); }

// The lower and the upper half of a vector of floats as doubles, and two such halves rounded back to floats.
static inline f64 widen(f32 v, bool upper) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(upper ? _mm512_extractf32x8_ps(v, 1) : _mm512_castps512_ps256(v));
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(upper ? _mm256_extractf128_ps(v, 1) : _mm256_castps256_ps128(v));
#else
  f64 wide;
  for (int i = 0; i < W / 2; ++i) wide[i] = v[i + (upper ? W / 2 : 0)];
  return wide;
#endif
}

static inline f32 narrow(f64 lower, f64 upper) {
#if defined(__AVX512F__)
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(lower)), _mm512_cvtpd_ps(upper), 1);
#elif defined(__AVX2__)
  return _mm256_set_m128(_mm256_cvtpd_ps(upper), _mm256_cvtpd_ps(lower));
#else
  f32 v;
  for (int i = 0; i < W / 2; ++i) v[i] = static_cast<float>(lower[i]), v[i + W / 2] = static_cast<float>(upper[i]);
  return v;
#endif
}

// Stores past the caches, to an address aligned to the vector; complete for others to see after fence().
static inline void stream(void* p, f32 v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(static_cast<float*>(p), v);
#elif defined(__AVX2__)
  _mm256_stream_ps(static_cast<float*>(p), v);
#elif defined(__SSE2__)
  _mm_stream_ps(static_cast<float*>(p), v);
#else
  memcpy(p, &v, sizeof v);
#endif
}

static inline void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// --- half floats ----------------------------------------------------------------------------------------------

static inline f32 from_bfloat16(u16 v) { return bits_to_float(__builtin_convertvector(v, u32) << 16); }

// To nearest, ties to even; a NaN stays one.
static inline u16 to_bfloat16(f32 v) {
  const u32 x = float_to_bits(v);
  const u32 rounded = x + 0x7fffu + ((x >> 16) & 1u), nan = (x >> 16) | 0x40u;
  return __builtin_convertvector((v == v ? rounded >> 16 : nan), u16);
}

static inline f32 from_float16(u16 v) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)v);
#elif defined(__F16C__)
  return _mm256_cvtph_ps((__m128i)v);
#else
  const u32 x = __builtin_convertvector(v, u32), magnitude = x & 0x7fffu;
  const u32 scaled = float_to_bits(bits_to_float(magnitude << 13) * 0x1p+112f);  // also right for subnormals
  const u32 special = 0x7f800000u | magnitude << 13;
  return bits_to_float((magnitude >= 0x7c00u ? special : scaled) | (x & 0x8000u) << 16);
#endif
}

static inline u16 to_float16(f32 v) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (u16)h;
#elif defined(__F16C__)
  const __m128i h = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (u16)h;
#else
  const u32 x = float_to_bits(v), sign = (x >> 16) & 0x8000u, magnitude = x & 0x7fffffffu;
  const u32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the last place of a half is 2^-24: adding 1/2 leaves the rounded count of it in the low bits.
  const u32 small = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(set(0.5f));
  u32 half = magnitude < (113u << 23) ? small : normal;
  half = magnitude >= 0x477ff000u ? u32{} + 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? u32{} + 0x7e00u : half;
  return __builtin_convertvector(half | sign, u16);
#endif
}

// --- across lanes ---------------------------------------------------------------------------------------------

template <typename F>
static inline float fold(f32 v, F op) {
  float lane[W];
  store(lane, v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = op(lane[i], lane[i + half]);
  return lane[0];
}

#if defined(__SSE2__)
static inline __m128 quarter_sum(__m128 v) {  // of four lanes, by halves
  v = _mm_add_ps(v, _mm_movehl_ps(v, v));
  return _mm_add_ss(v, _mm_shuffle_ps(v, v, 1));
}
static inline __m128 quarter_max(__m128 v) {
  v = _mm_max_ps(v, _mm_movehl_ps(v, v));
  return _mm_max_ss(v, _mm_shuffle_ps(v, v, 1));
}
#endif

static inline float sum_lanes(f32 v) {
#if defined(__AVX512F__)
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  return _mm_cvtss_f32(quarter_sum(_mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1))));
#elif defined(__AVX2__)
  return _mm_cvtss_f32(quarter_sum(_mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1))));
#elif defined(__SSE2__)
  return _mm_cvtss_f32(quarter_sum(v));
#else
  return fold(v, [](float a, float b) { return a + b; });
#endif
}

static inline float max_lanes(f32 v) {
#if defined(__AVX512F__)
  const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  return _mm_cvtss_f32(quarter_max(_mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1))));
#elif defined(__AVX2__)
  return _mm_cvtss_f32(quarter_max(_mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1))));
#elif defined(__SSE2__)
  return _mm_cvtss_f32(quarter_max(v));
#else
  return fold(v, [](float a, float b) { return a > b ? a : b; });
#endif
}

static inline float sum_block(f32 (&v)[U]) {
  for (int half = U / 2; half > 0; half /= 2)
    for (int u = 0; u < half; ++u) v[u] += v[u + half];
  return sum_lanes(v[0]);
}

static inline float max_block(f32 (&v)[U]) {
  for (int half = U / 2; half > 0; half /= 2)
    for (int u = 0; u < half; ++u) v[u] = max(v[u], v[u + half]);
  return max_lanes(v[0]);
}

// --- functions ------------------------------------------------------------------------------------------------

// exp.h lane by lane: the same operations in the same order, hence the same bits where there is an fma.
static inline f32 exp_nonpos(f32 x) {
  const f32 n = fma(x, set(kLog2e), set(kRound)) - kRound;
  f32 r = fma(n, set(-kLn2Hi), x);
  r = fma(n, set(-kLn2Lo), r);
  f32 p = fma(set(kExpP4), r, set(kExpP3));
  p = fma(p, r, set(kExpP2));
  p = fma(p, r, set(kExpP1));
  p = fma(p, r, set(kExpP0));
  p = fma(p, r * r, r) + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 tiny = _mm512_cmp_ps_mask(x, set(kExpMin), _CMP_LT_OQ);
  return _mm512_mask_blend_ps(tiny, _mm512_scalef_ps(p, n), f32{});
#else
  // A NaN's n converts to 2^31 on x86 and to 0 on Arm; either is shifted out, so that p keeps its bits.
  const u32 shift = (u32)__builtin_convertvector(n, i32) << 23;
  return x < kExpMin ? f32{} : bits_to_float(float_to_bits(p) + shift);
#endif
}

struct LogParts {  // x = 2^e (1 + f), log(1 + f) = f - f^2/2 + f^3 p
  f32 e, f, p;
};

static inline __attribute__((always_inline)) LogParts log_parts(f32 x) {
  const u32 bits = float_to_bits(x), whole = (bits - kSqrtHalfBits) & 0xff800000u;
  LogParts v;
  v.e = __builtin_convertvector((i32)whole >> 23, f32);
  v.f = bits_to_float(bits - whole) - 1.0f;
  v.p = fma(set(kLogP7), v.f, set(kLogP6));
  v.p = fma(v.p, v.f, set(kLogP5));
  v.p = fma(v.p, v.f, set(kLogP4));
  v.p = fma(v.p, v.f, set(kLogP3));
  v.p = fma(v.p, v.f, set(kLogP2));
  v.p = fma(v.p, v.f, set(kLogP1));
  v.p = fma(v.p, v.f, set(kLogP0));
  return v;
}

// log.h lane by lane, for normal x > 0.
static inline f32 log_normal(f32 x) {
  const LogParts v = log_parts(x);
  const f32 log1 = fma(fma(v.p, v.f, set(-0.5f)), v.f * v.f, v.f);
  return x == x ? fma(v.e, set(kLn2Hi), fma(v.e, set(kLn2Lo), log1)) : x;
}

// r - 1 - log r for normal r > 0, by the same P: f^2 (1/2 - f P(f)) where r is near 1, so that nothing cancels.
static inline f32 log_excess(f32 r) {
  const LogParts v = log_parts(r);
  const f32 square = v.f * v.f, near = square * fma(-v.p, v.f, set(0.5f));
  const f32 log_r = fma(v.e, set(kLn2Hi), fma(v.e, set(kLn2Lo), fma(fma(v.p, v.f, set(-0.5f)), square, v.f)));
  return v.e == 0.0f ? near : (r - 1.0f) - log_r;
}

// log x for x >= 1 in doubles, from 2 artanh(f / (2 + f)); error 2e-13 of it. NaN gives NaN.
static inline f64 log_from_one(f64 x) {
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcdull, kTwo52 = 0x4330000000000000ull;
  const u64 whole = ((u64)x - kSqrtHalf) & 0xfff0000000000000ull;
  const f64 e = (f64)(whole >> 52 | kTwo52) - 0x1p52, f = (f64)((u64)x - whole) - 1.0;
  const f64 s = f / (f + 2.0), z = s * s;
  f64 p = fma(set(2.0 / 17), z, set(2.0 / 15));
  p = fma(p, z, set(2.0 / 13));
  p = fma(p, z, set(2.0 / 11));
  p = fma(p, z, set(2.0 / 9));
  p = fma(p, z, set(2.0 / 7));
  p = fma(p, z, set(2.0 / 5));
  p = fma(p, z, set(2.0 / 3));
  const f64 log1 = fma(p * z, s, s + s);
  return x == x ? fma(e, set(0x1.62e42fefa39efp-1), log1) : x;
}

// log(1 + z) for z in [0, 1]. The last term restores what 1 + z rounds away, at most 2^-24, so that 1.5 - w / 2, right
// at w = 1 and 2, is 1 / w enough. Largest relative error: 1.3e-7.
static inline f32 log1p_unit(f32 z) {
  const f32 w = z + 1.0f;
  return fma(z - (w - 1.0f), fma(set(-0.5f), w, set(1.5f)), log_normal(w));
}

// The integer part of x >= 0, x < 2^63, lane by lane.
static inline void store_integers(uint64_t* p, f32 x) {
#if defined(__AVX512F__)
  _mm512_storeu_si512(p, _mm512_cvttps_epi64(_mm512_castps512_ps256(x)));
  _mm512_storeu_si512(p + 8, _mm512_cvttps_epi64(_mm512_extractf32x8_ps(x, 1)));
#elif defined(__AVX2__)
  // mantissa 2^(exponent - 150), shifted left or right: the shift that does not apply is too far and gives 0.
  for (int half = 0; half < 2; ++half) {
    const __m128 v = half ? _mm256_extractf128_ps(x, 1) : _mm256_castps256_ps128(x);
    const __m256i bits = _mm256_cvtepu32_epi64(_mm_castps_si128(v));
    const __m256i mantissa = _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi64x(0x7fffff)),
                                             _mm256_set1_epi64x(0x800000));
    const __m256i left = _mm256_sub_epi64(_mm256_srli_epi64(bits, 23), _mm256_set1_epi64x(150));
    const __m256i right = _mm256_sub_epi64(_mm256_setzero_si256(), left);
    const __m256i q = _mm256_or_si256(_mm256_sllv_epi64(mantissa, left), _mm256_srlv_epi64(mantissa, right));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 4 * half), q);
  }
#else
  for (int i = 0; i < W; ++i) p[i] = static_cast<uint64_t>(static_cast<int64_t>(x[i]));
#endif
}

}  // namespace di4c::cpu::DI4C_ISA
