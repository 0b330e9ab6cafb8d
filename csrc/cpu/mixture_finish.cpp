// From sums over blocks of positions to a sample's values: needs the forward's workspace alone, none of the logits.
#include "divergence.h"
#include "kernels.h"

namespace di4c::cpu::DI4C_ISA {
namespace {

// The blocks of (b, k) in order, then the mean over l.
void finish(const MixtureArgs& args, int64_t b, int64_t k, double* total) {
  const int64_t blocks = ceil_div(args.D, kPositions);
  for (int64_t l = 0; l <= args.L; ++l) {
    total[l] = 0;
    for (int64_t i = 0; i < blocks; ++i) total[l] += args.work[((b * blocks + i) * (args.L + 1) + l) * args.K + k];
  }
  double top = total[0], sum = 0;
  for (int64_t l = 1; l < args.L; ++l) top = total[l] > top || total[l] != total[l] ? total[l] : top;
  const double shift = top == -static_cast<double>(kInf) ? 0 : top;
  for (int64_t l = 0; l < args.L; ++l) sum += total[l] = ::exp(total[l] - shift);
  const double correlation = shift + ::log(sum) - ::log(static_cast<double>(args.L));
  for (int64_t l = 0; l < args.L; ++l)
    args.share[(b * args.L + l) * args.K + k] = sum == 0 ? 0.0f : static_cast<float>(total[l] / sum);
  args.correlation[b * args.K + k] = static_cast<float>(correlation);
  args.joint[b * args.K + k] = static_cast<float>(correlation + total[args.L]);
}

}  // namespace

void mixture_finish(const MixtureArgs& args, int threads) {
  if (args.L <= 0) return;
  for (int64_t i = 0; i < kParts * args.B; ++i) {
    const float* weight = args.weight ? args.weight + i % args.B * args.D : nullptr;
    args.parts[i] = weighted_sum(args.row + i * args.D, weight, args.D);
  }
  const int64_t additions = args.B * args.K * args.L * (ceil_div(args.D, kPositions) + 16);
  const size_t scratch = static_cast<size_t>(args.L + 1) * sizeof(double);
  parallel(args.B, threads, additions, scratch, [&](int64_t b, void* memory) {
    for (int64_t k = 0; k < args.K; ++k) finish(args, b, k, static_cast<double*>(memory));
  });
}

}  // namespace di4c::cpu::DI4C_ISA
