// The kernels' contract: one struct of raw pointers and sizes per kernel, the same for every backend.
//
// Logits are (B, L, D, S): classes contiguous, the other strides arbitrary (in elements, 0 allowed), rows at
// any alignment. Logistic logits (logistic.h) have two floats in place of a row, mean and log-scale, and no row in
// memory at all; a gradient of theirs is two floats too. Sequences may lie apart too. Everything else is contiguous in
// the order of its indices.
// Pointers marked "or null" may be.
// No kernel allocates, keeps state or syncs; workspace is handed in. N = 0 anywhere returns at once. A `split`
// workspace lets CUDA devices without clusters share a long row between CTAs; its tickets are 0 again afterwards.
//
// Log-sum-exps are kept as two floats a row, in planes: [0] the row's maximum m, [1] log sum exp(x - m). Every
// log-probability is (x - m) - log_sum, in that order: one float of m + log_sum would lose 3e-5 of it at m = 1000.
// Rows of weight 0 hold 0 in both; a bad row (NaN, +inf, -inf throughout) has NaN in [1] and anything in [0].
#pragma once
#include "di4c/config.h"

namespace di4c {

struct Logits {  // rows of S classes indexed (b, l, d)
  const void* data;
  DType dtype;
  int64_t stride_b, stride_l, stride_d;
};

struct Sequences {  // tokens indexed (b, k, d), any strides
  const int64_t* data;
  int64_t stride_b, stride_k, stride_d;
};

// 128 bits for each (b, i): out[b, i, 0..1]. Word 3 of the counter is `stream` as given, word 2 is 0.
struct RandomBitsArgs {
  const int64_t* keys;  // (B,)
  int64_t* out;         // (B, N, 2)
  int64_t B, N;
  uint32_t stream;
};

// One or more draws per row; with x_t, the absorbing step: coin first, token second.
struct SampleArgs {
  Logits logits;              // (B, 1, D, S)
  const int64_t* keys;        // (B,)
  const int64_t* x_t;         // (B, D) or null: draw at every position
  const double* unmask_prob;  // (B,), with x_t only
  int64_t mask_id;            // state that means "masked", never drawn if < S; -1 for none
  int64_t* tokens;            // (B, draws, D)
  float* log_prob;            // (B, draws, D) or null: log-probability of the token drawn, 0 where none was
  uint32_t* split;            // workspace for long rows or null: B D tickets of 0, then B D 2 ceil(S / kChunk) words
  int64_t B, D, S, draws;
  int64_t first;              // the position that row d = 0 stands for: draws are counted by first + d
  uint32_t stream;
  float temperature;          // 0: the largest logit, the smallest index on ties
};

// Draws of states s in proportion to left[n,i,s] right[n,j,s] + base[n,i,j], for the rows i and j that each position
// names: the reverse step of a process whose transitions are tables, i the state now and j the clean one (product.h).
struct ProductArgs {
  const double* left;   // (N, S, S), entries >= 0
  const double* right;  // (N, S, S)
  const double* base;   // (N, S, S) or null: 0
  const int64_t* i;     // (B, D)
  const int64_t* j;     // (B, draws, D)
  const int64_t* keys;  // (B,)
  int64_t* tokens;      // (B, draws, D); -1 where i or j is no state, or the product no law
  int64_t B, D, S, N, draws;  // N is B, or 1: tables for all samples
  uint32_t stream;            // the draws take its coin words, so that tokens of one stream are independent of them
};

// Select and reveal: of the positions of x_t that are masked, the count[b] of the highest confidence log p + noise[b] g
// take their tokens, g a Gumbel number of the coin words (reveal.h). Everything else is as it was.
struct RevealArgs {
  const int64_t* x_t;     // (B, D)
  const int64_t* tokens;  // (B, draws, D)
  const float* log_prob;  // (B, draws, D)
  const int64_t* count;   // (B,), bounded by 0 and the number of candidates
  const float* noise;     // (B,)
  const int64_t* keys;    // (B,)
  int64_t* x_s;           // (B, draws, D); -1 where a masked position has a negative token or a NaN for confidence
  int64_t mask_id, B, D, draws;
  uint32_t stream;
};

enum Part : int { kDistillation = 0, kMarginalTeacher = 1, kMarginalTarget = 2, kInformation = 3, kParts = 4 };

// A mixture of L products against K sequences, a teacher and a target that is a mixture of T; any may be absent.
// With a = log p_l^d(x_k^d), pbar = mean_l p_l, gbar = mean_t g_t:
//   joint[b,k]              = LME_l sum_d w a
//   correlation[b,k]        = LME_l sum_d w (a - LME_l a)
//   parts[kDistillation]    = mean_l sum_d w KL(teacher || p_l)      0 without a teacher, and where inside[b] is 0
//   parts[kMarginalTeacher] = sum_d w KL(teacher || pbar)            0 without a teacher
//   parts[kMarginalTarget]  = sum_d w KL(gbar || pbar)               0 without a target, and where inside[b] is 1
//   parts[kInformation]     = sum_d w KL(p_0 || pbar)                0 unless `information`
// mixture_positions does what reads rows, mixture_finish adds the blocks of positions up; between the two, work and
// row of several calls over 16-position-aligned pieces of D may be laid side by side.
struct MixtureArgs {
  Logits logits;          // (B, L, D, S)
  Logits teacher;         // (B, 1, D, S) or data null
  Logits target;          // (B, T, D, S) or data null; not read where inside[b] is 1
  Sequences first;        // (B, 1, D), the first of the K sequences, or data null: it is among the others
  Sequences tokens;       // (B, K, D), or the K - 1 after the first
  const uint8_t* inside;  // (B,) of 0 and 1, or null: every part for every sample
  const float* weight;    // (B, D) or null: 1
  float* joint;           // (B, K)
  float* correlation;     // (B, K)
  float* parts;           // (kParts, B)
  float* lse;             // (2, B, L, D), kept for backward
  float* lse_teacher;     // (2, B, 1, D), kept for backward
  float* lse_target;      // (2, B, T, D), kept for backward; 0 for rows that are not read
  float* share;           // (B, L, K), softmax over l of sum_d w a, kept for backward
  float* pull;            // (., B, L, D), kept for backward: sum_s t_s p_l(s) / sum_l' p_l'(s), a plane for the teacher
                          // where there is one, then one for the target where there is one
  double* work;           // (B, ceil(D / kPositions), L + 1, K)
  float* row;             // (kParts, B, D): the parts of one position, without its weight
  int64_t B, L, D, S, K, T, information;
};

struct MixtureBackwardArgs {
  Logits logits, teacher, target;
  Sequences first, tokens;
  const uint8_t* inside;
  const float* weight;
  const float *joint, *correlation;  // (B, K): where one is -inf, its gradient is taken as 0
  const float *lse, *lse_teacher, *lse_target, *share, *pull;
  const float *grad_joint, *grad_correlation;  // (B, K)
  const float* grad_parts;                     // (kParts, B); kInformation has no gradient
  void* grad;  // (B, L, D, S), contiguous, dtype of the logits ((B, L, D, 2) for logistic ones); may be logits.data
  int64_t B, L, D, S, K, T;
};

// x_k^d of sample b, for the arguments of either kernel.
template <typename Args>
DI4C_FN int64_t token_of(const Args& a, int64_t b, int64_t k, int64_t d) {
  if (a.first.data) {
    if (k == 0) return a.first.data[b * a.first.stride_b + d * a.first.stride_d];
    --k;
  }
  return a.tokens.data[b * a.tokens.stride_b + k * a.tokens.stride_k + d * a.tokens.stride_d];
}

enum RowLoss : int { kForwardKl = 0, kReverseKl = 1, kJensenShannon = 2, kTotalVariation = 3, kCrossEntropy = 4 };

// loss[b,l] = sum_d w f(target_d, logits_ld); the target has no l: it is shared by all
struct RowLossArgs {
  RowLoss kind;
  Logits target;          // (B, 1, D, S); data null for cross entropy
  const int64_t* tokens;  // (B, D), cross entropy only
  Logits logits;          // (B, L, D, S)
  const float* weight;    // (B, D) or null
  float* loss;            // (B, L)
  float* stats;           // (5, B, L, D): the logits' two planes, the target's two, the kind's own row scalar
  float* row;             // (B, L, D) workspace
  uint32_t* split;        // workspace for long rows or null: B L D tickets of 0, then B L D 32 words
  int64_t B, L, D, S;
};

struct RowLossBackwardArgs {
  RowLoss kind;
  Logits target;
  const int64_t* tokens;
  Logits logits;
  const float* weight;
  const float* stats;      // (5, B, L, D)
  const float* grad_loss;  // (B, L)
  void* grad;              // (B, L, D, S), contiguous, dtype of the logits
  int64_t B, L, D, S;
};

namespace cpu {  // threads: how many may work, the caller's included
void random_bits(const RandomBitsArgs&, int threads);
void sample(const SampleArgs&, int threads);
void sample_product(const ProductArgs&, int threads);
void reveal(const RevealArgs&, int threads);
void mixture_positions(const MixtureArgs&, int threads);
void mixture_finish(const MixtureArgs&, int threads);
void mixture_backward(const MixtureBackwardArgs&, int threads);
void row_loss(const RowLossArgs&, int threads);
void row_loss_backward(const RowLossBackwardArgs&, int threads);
}  // namespace cpu

namespace cuda {  // launched on `stream` (a cudaStream_t) of `device`; throws std::runtime_error
void random_bits(const RandomBitsArgs&, int device, void* stream);
void sample(const SampleArgs&, int device, void* stream);
void sample_product(const ProductArgs&, int device, void* stream);
void reveal(const RevealArgs&, int device, void* stream);
void mixture_positions(const MixtureArgs&, int device, void* stream);
void mixture_finish(const MixtureArgs&, int device, void* stream);
void mixture_backward(const MixtureBackwardArgs&, int device, void* stream);
void row_loss(const RowLossArgs&, int device, void* stream);
void row_loss_backward(const RowLossBackwardArgs&, int device, void* stream);
}  // namespace cuda

}  // namespace di4c
