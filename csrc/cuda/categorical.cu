#include "categorical.cuh"

#include "launch.cuh"

namespace di4c::cuda {

void random_bits(const RandomBitsArgs& a, int device, void* stream) {
  const DeviceGuard guard(device);
  const int64_t items = a.B * a.N;
  if (items == 0) return;
  const dim3 block(256);
  const Work work{"random_bits", a.B, 1, a.N, 1, a.B * (8 + 16 * a.N)};
  launch(work, random_bits_kernel, grid_for(items, block.x), block, stream, a);
}

namespace {

// Positions that a group of threads looks at together. Where some may stay as they are, looking is most of the work for
// most; but there should be groups enough to fill any device.
int tile_of(const SampleArgs& a, int64_t groups) {
  return a.x_t == nullptr ? 1 : static_cast<int>(std::max<int64_t>(std::min<int64_t>(a.B * a.D / groups, kWarp), 1));
}

template <int kDType>
void launch_sample(const Work& work, const SampleArgs& a, void* stream) {
  const int64_t rows = a.B * a.D;
  const dim3 warp_each(kWarp, kMaxWarps);
  if (a.S <= kPackedStates) {
    int lanes = 1;
    while (lanes * kVector < a.S) lanes *= 2;
    launch(work, sample_packed_kernel<kDType>, grid_for(ceil_div(rows, kWarp / lanes), warp_each.y), warp_each, stream,
           a, lanes);
  } else if (a.S <= kWarpChunks * kChunk) {
    const int tile = tile_of(a, int64_t{DI4C_MANY_CTAS} * kMaxWarps);
    launch(work, sample_warp_kernel<kDType>, grid_for(ceil_div(rows, tile), warp_each.y), warp_each, stream, a, tile);
  } else {
    const int64_t warps = std::min<int64_t>(ceil_div(a.S, kChunk), kMaxWarps);
    const Split split = split_rows(a.S, rows, a.split);
    const int tile = tile_of(a, DI4C_MANY_CTAS);
    const dim3 block(static_cast<unsigned>(warps * kWarp));
    launch(work, sample_long_kernel<kDType>, split_shape(split, ceil_div(rows, tile), block), stream, a, split, tile);
  }
}

}  // namespace

void sample(const SampleArgs& a, int device, void* stream) {
  const DeviceGuard guard(device);
  const int64_t rows = a.B * a.D;
  if (rows == 0 || a.draws == 0 || a.S == 0) return;
  if (a.S > kMaxStates) {
    throw std::runtime_error("di4c: sample takes at most " + std::to_string(kMaxStates) + " states, got S = " +
                             std::to_string(a.S));
  }
  const int64_t per_draw = 8 + (a.log_prob == nullptr ? 0 : 4);
  const Work work{"sample", a.B, 1, a.D, a.S,
                  rows * (row_bytes(a.logits.dtype, a.S) + (a.x_t == nullptr ? 0 : 8) + a.draws * per_draw)};
  with_logits(a.logits.dtype, [&](auto dtype) { launch_sample<decltype(dtype)::value>(work, a, stream); });
}

}  // namespace di4c::cuda
