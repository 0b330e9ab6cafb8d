// What host and device code share: qualifiers, dtypes and the sizes that fix the order of every sum.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define DI4C_FN __host__ __device__ __forceinline__
#else
// static: a copy compiled for AVX-512 must not be the one the linker keeps for the baseline.
#define DI4C_FN static inline
#endif

namespace di4c {

// How logits lie in memory. Everything is accumulated in float or better. kLogistic: a row of S logits is two floats,
// mean and log-scale, from which they are computed (logistic.h).
enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kLogistic = 3 };

// The sampler cuts a row of S classes into chunks of kChunk; the cut is the same on every backend,
// so the same 128 random bits choose the same class everywhere (masses.h).
constexpr int kChunk = 1024;
constexpr int64_t kMaxStates = int64_t{1} << 18;
constexpr int kMaxChunks = static_cast<int>(kMaxStates / kChunk);

// Sums over the D positions are cut into blocks of kPositions whose partial sums are added in order,
// so that neither the number of threads nor the grid changes a bit of the result.
constexpr int kPositions = 16;

// On CUDA, rows of more states than kLongRow are summed in parts, and up to kFewRows of them shared by several CTAs
// each; more rows fill any device with a CTA to a row.
constexpr int64_t kLongRow = 16384, kFewRows = 2048;

DI4C_FN constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace di4c
