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

int64_t vectors_of_thread(int64_t S, int parts, dim3 block) {
  return ceil_div(part_length(S, parts), kVector * block.x);
}

// Of those of the row and of its target, how many a thread may keep: in half a multiprocessor's shared memory, that
// there be two CTAs at least.
int vectors_kept(DType dtype, int64_t S, int parts, dim3 block) {
  const Device device = current_device();
  const int64_t fixed = 4096, each = int64_t{2} * row_bytes(dtype, kVector) * block.x * block.y;
  const int64_t room = std::min<int64_t>(device.shared_of_cta, device.shared_of_sm / 2) - fixed;
  return static_cast<int>(std::min(vectors_of_thread(S, parts, block), room / each));
}

int64_t stage_bytes(DType dtype, int kept, dim3 block) {
  return int64_t{2} * row_bytes(dtype, kVector) * kept * block.x * block.y;
}

// One sweep of every row and of the targets, which L rows share.
int64_t sweep_bytes(const RowLossArgs& a) {
  const int64_t targets = a.target.data == nullptr ? 0 : a.B * a.D * row_bytes(a.target.dtype, a.S);
  return a.B * a.L * a.D * row_bytes(a.logits.dtype, a.S) + targets;
}

// A sweep, another of what is not kept between the two, and the row's numbers.
Work work_of(const RowLossArgs& a, int kept, int parts, dim3 block) {
  const int64_t vectors = vectors_of_thread(a.S, parts, block), sweep = sweep_bytes(a);
  const int64_t again = a.kind == kCrossEntropy || a.S == 0 ? 0 : sweep / vectors * (vectors - kept);
  return {kNames[a.kind], a.B, a.L, a.D, a.S, sweep + again + a.B * a.L * a.D * 24};
}

template <int kDType, int kKind>
void launch_long_rows(const RowLossArgs& a, void* stream) {
  const int64_t rows = a.B * a.L * a.D;
  const dim3 block(kMaxThreads);
  const Split split = split_rows(a.S, rows, a.split);
  const auto kernel = row_loss_split_kernel<kDType, kKind>;
  if (split.way == kTicket && kKind != kCrossEntropy) {
    Work work = work_of(a, 0, split.parts, block);
    work.bytes /= 2;
    launch(work, kernel, split_shape(split, rows, block), stream, a, 0, split, kFirstOnly);
    launch(work, kernel, split_shape(split, rows, block), stream, a, 0, split, kSecondOnly);
    return;
  }
  const int kept = split.way == kCluster && kKind != kCrossEntropy
                       ? vectors_kept(a.logits.dtype, a.S, split.parts, block)
                       : 0;
  const size_t shared = static_cast<size_t>(stage_bytes(a.logits.dtype, kept, block));
  launch(work_of(a, kept, split.parts, block), kernel, split_shape(split, rows, block, shared), stream, a, kept, split,
         kBoth);
}

template <int kDType, int kKind>
void launch_rows(const RowLossArgs& a, void* stream) {
  const dim3 block = row_block(a.S);
  const int kept = kKind == kCrossEntropy ? 0 : vectors_kept(a.logits.dtype, a.S, 1, block);
  const size_t shared = static_cast<size_t>(stage_bytes(a.logits.dtype, kept, block));
  launch(work_of(a, kept, 1, block), row_loss_kernel<kDType, kKind>,
         Shape{grid_for(a.B * a.L * a.D, block.y), block, 1, shared}, stream, a, kept);
}

}  // namespace

void row_loss(const RowLossArgs& a, int device, void* stream) {
  const DeviceGuard guard(device);
  if (a.B * a.L * a.D > 0) {
    with_kind(a.kind, [&](auto kind) {
      with_dtype(a.logits.dtype, [&](auto dtype) {
        constexpr int kDType = decltype(dtype)::value, kKind = decltype(kind)::value;
        if (row_parts(a.S) > 1) {
          launch_long_rows<kDType, kKind>(a, stream);
        } else {
          launch_rows<kDType, kKind>(a, stream);
        }
      });
    });
  }
  const int64_t sums = a.B * a.L;
  if (sums == 0) return;
  const dim3 block(kWarp, 4);
  launch({"row_loss (sum over positions)", a.B, a.L, a.D, a.S, sums * (a.D * 4 + 4) + a.B * a.D * 4},
         weighted_sum_kernel, grid_for(sums, block.y), block, stream, a.row, a.weight, a.loss, sums, a.L, a.D);
}

void row_loss_backward(const RowLossBackwardArgs& a, int device, void* stream) {
  const DeviceGuard guard(device);
  const int64_t rows = a.B * a.L * a.D;
  if (rows == 0 || a.S == 0) return;
  const int64_t targets = a.target.data == nullptr ? 0 : a.B * a.D * row_bytes(a.target.dtype, a.S);
  const Work work{kBackwardNames[a.kind], a.B, a.L, a.D, a.S,
                  rows * (2 * row_bytes(a.logits.dtype, a.S) + 20) + targets};
  const dim3 block = row_block(a.S);
  dim3 grid = grid_for(rows, block.y);
  grid.y = row_parts(a.S);
  with_kind(a.kind, [&](auto kind) {
    with_dtype(a.logits.dtype, [&](auto dtype) {
      launch(work, row_loss_backward_kernel<decltype(dtype)::value, decltype(kind)::value>, grid, block, stream, a);
    });
  });
}

}  // namespace di4c::cuda
