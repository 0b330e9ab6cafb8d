// The kernels' contract: one struct of raw pointers and sizes per kernel, the same for every backend.
//
// Logits are (B, L, D, S): classes contiguous, the other strides arbitrary (in elements, 0 allowed), rows at
// any alignment. Everything else is contiguous in the order of its indices. Pointers marked "or null" may be.
// No kernel allocates, keeps state or syncs; workspace is handed in. N = 0 anywhere returns at once.
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
  int64_t B, D, S, draws;
  uint32_t stream;
  float temperature;          // 0: the largest logit, the smallest index on ties
};

// joint[b,k] = LME_l sum_d w a,  correlation[b,k] = LME_l sum_d w (a - LME_l a),  a = log p_l^d(x_k^d)
struct MixtureLogProbArgs {
  Logits logits;          // (B, L, D, S)
  const int64_t* tokens;  // (B, K, D)
  const float* weight;    // (B, D) or null: 1
  float* joint;           // (B, K)
  float* correlation;     // (B, K)
  float* lse;             // (2, B, L, D), kept for backward
  float* share;           // (B, L, K), softmax over l of sum_d w a, kept for backward
  double* work;           // (B, ceil(D / kPositions), L + 1, K)
  int64_t B, L, D, S, K;
};

struct MixtureLogProbBackwardArgs {
  Logits logits;
  const int64_t* tokens;
  const float* weight;
  const float *lse, *share;                    // (2, B, L, D), (B, L, K)
  const float *grad_joint, *grad_correlation;  // (B, K)
  void* grad;                                  // (B, L, D, S), contiguous, dtype of the logits
  int64_t B, L, D, S, K;
};

// kl[b] = sum_d w KL(mean_l' softmax target || mean_l softmax logits)
struct MixtureKlArgs {
  Logits target;        // (B, T, D, S)
  Logits logits;        // (B, L, D, S)
  const float* weight;  // (B, D) or null
  float* kl;            // (B,)
  float* lse_target;    // (2, B, T, D), kept for backward
  float* lse;           // (2, B, L, D), kept for backward
  float* pull;          // (B, L, D): sum_s t_s p_l(s) / sum_l' p_l'(s), kept for backward
  float* row;           // (B, D) workspace
  int64_t B, T, L, D, S;
};

struct MixtureKlBackwardArgs {
  Logits target, logits;
  const float* weight;
  const float *lse_target, *lse, *pull;  // (2, B, T, D), (2, B, L, D), (B, L, D)
  const float* grad_kl;  // (B,)
  void* grad;            // (B, L, D, S), contiguous, dtype of the logits
  int64_t B, T, L, D, S;
};

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
void mixture_log_prob(const MixtureLogProbArgs&, int threads);
void mixture_log_prob_backward(const MixtureLogProbBackwardArgs&, int threads);
void mixture_kl(const MixtureKlArgs&, int threads);
void mixture_kl_backward(const MixtureKlBackwardArgs&, int threads);
void row_loss(const RowLossArgs&, int threads);
void row_loss_backward(const RowLossBackwardArgs&, int threads);
}  // namespace cpu

namespace cuda {  // launched on `stream` (a cudaStream_t) of `device`; throws std::runtime_error
void random_bits(const RandomBitsArgs&, int device, void* stream);
void sample(const SampleArgs&, int device, void* stream);
void mixture_log_prob(const MixtureLogProbArgs&, int device, void* stream);
void mixture_log_prob_backward(const MixtureLogProbBackwardArgs&, int device, void* stream);
void mixture_kl(const MixtureKlArgs&, int device, void* stream);
void mixture_kl_backward(const MixtureKlBackwardArgs&, int device, void* stream);
void row_loss(const RowLossArgs&, int device, void* stream);
void row_loss_backward(const RowLossBackwardArgs&, int device, void* stream);
}  // namespace cuda

}  // namespace di4c
