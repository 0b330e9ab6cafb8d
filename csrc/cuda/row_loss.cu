#include "row_loss.cuh"

#include "launch.cuh"

namespace di4c::cuda {

namespace {

constexpr const char* kNames[] = {"masked_kl", "masked_reverse_kl", "masked_js", "masked_tv", "masked_cross_entropy"};
constexpr const char* kBackwardNames[] = {"masked_kl_backward", "masked_reverse_kl_backward", "masked_js_backward",
                                          "masked_tv_backward", "masked_cross_entropy_backward"};

template <class F>
void with_kind(RowLoss kind, F f) {
  switch (kind) {
    case kForwardKl: return f(Constant<kForwardKl>());
    case kReverseKl: return f(Constant<kReverseKl>());
    case kJensenShannon: return f(Constant<kJensenShannon>());
    case kTotalVariation: return f(Constant<kTotalVariation>());
    case kCrossEntropy: return f(Constant<kCrossEntropy>());
  }
  throw std::runtime_error("di4c: unknown row loss " + std::to_string(static_cast<int>(kind)));
}

}  // namespace

void row_loss(const RowLossArgs& a, int device, void* stream) {
  const DeviceGuard guard(device);
  const int64_t rows = a.B * a.L * a.D;
  with_kind(a.kind, [&](auto kind) {
    const Work work{kNames[a.kind], a.B, a.L, a.D, a.S};
    const dim3 block = row_block(a.S), grid = grid_for(rows, block.y);
    if (rows > 0) {
      with_dtype(a.logits.dtype, [&](auto dtype) {
        launch(work, row_loss_kernel<decltype(dtype)::value, decltype(kind)::value>, grid, block, stream, a);
      });
    }
    launch_weighted_sum(work, a.row, a.weight, a.loss, stream);
  });
}

void row_loss_backward(const RowLossBackwardArgs& a, int device, void* stream) {
  const DeviceGuard guard(device);
  const int64_t rows = a.B * a.L * a.D;
  if (rows == 0 || a.S == 0) return;
  with_kind(a.kind, [&](auto kind) {
    with_dtype(a.logits.dtype, [&](auto dtype) {
      const dim3 block = row_block(a.S), grid = grid_for(rows, block.y);
      launch({kBackwardNames[a.kind], a.B, a.L, a.D, a.S},
             row_loss_backward_kernel<decltype(dtype)::value, decltype(kind)::value>, grid, block, stream, a);
    });
  });
}

}  // namespace di4c::cuda
