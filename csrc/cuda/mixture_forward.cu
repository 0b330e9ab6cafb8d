#include "launch.cuh"
#include "mixture_finish.cuh"
#include "mixture_positions.cuh"

namespace di4c::cuda {

namespace {

// Rows of several operands may take more than the caches of all multiprocessors hold: then a cluster shares a position,
// and there are fewer of them on their way. From S, L and dtype alone, as every choice that a sum's order hangs on.
Slices slices_of(const MixtureArgs& p) {
  const int64_t bytes = p.L * row_bytes(p.logits.dtype, p.S), tiles = ceil_div(p.S, kMaxThreads * kVector);
  Slices slices{1, 1, 1};
  while (slices.count < kMaxSlices && bytes > slices.count * (int64_t{128} << 10) && 2 * slices.count <= tiles)
    slices.count *= 2;
  while (p.S > 4096 && slices.segments < kMaxSegments && slices.segments * p.L < kMaxSegments) slices.segments *= 2;
  if (slices.count > 1 && current_device().major >= 9) slices.cluster = slices.count;
  return slices;
}

int64_t rows_bytes(const Logits& x, int64_t B, int64_t rows, int64_t D, int64_t S) {
  return x.data == nullptr ? 0 : B * rows * D * (row_bytes(x.dtype, S) + 8);  // with their normalisers
}

// From DRAM: every row once, what is kept. (From the caches besides: the rows twice more where there are a teacher or a
// target, and a sector of 32 bytes for each of the B L D K tokens' logits.)
int64_t positions_bytes(const MixtureArgs& p) {
  const int64_t rows = rows_bytes(p.logits, p.B, p.L, p.D, p.S) + rows_bytes(p.teacher, p.B, 1, p.D, p.S) +
                       rows_bytes(p.target, p.B, p.T, p.D, p.S);
  const int64_t pulls = ((p.teacher.data != nullptr) + (p.T > 0)) * p.B * p.L * p.D * 4;
  return rows + pulls + p.B * p.D * kParts * 4;
}

// Tokens, and the sums over blocks of positions.
int64_t sequences_bytes(const MixtureArgs& p) {
  return p.B * p.K * (p.D * 8 + ceil_div(p.D, kPositions) * (p.L + 1) * 8);
}

int64_t finish_bytes(const MixtureArgs& p) {
  return p.B * (ceil_div(p.D, kPositions) * (p.L + 1) * p.K * 8 + p.L * p.K * 4 + kParts * p.D * 4);
}

}  // namespace

void mixture_positions(const MixtureArgs& p, int device, void* stream) {
  const DeviceGuard guard(device);
  if (p.B == 0 || p.L == 0 || p.D == 0) return;
  check_components("mixture_positions", p.L);
  const dim3 block = mixture_block(p.S, p.L);
  const bool diverges = p.teacher.data != nullptr || p.T > 0 || p.information != 0;
  const bool apart = p.K > 0 && diverges && block.y == 1;  // the sequences in a launch of their own
  const int64_t blocks = ceil_div(p.D, kPositions);
  if (p.K > 0 && !apart) {
    launch({"mixture_positions (tickets)", p.B, p.L, p.D, p.S, p.B * blocks * 8}, mixture_tickets_kernel,
           grid_for(p.B * blocks, kMaxThreads), dim3(kMaxThreads), stream, p);
  }
  const Work work{"mixture_positions", p.B, p.L, p.D, p.S, positions_bytes(p) + (apart ? 0 : sequences_bytes(p))};
  Shape shape{grid_over(ceil_div(p.D, block.y), p.B), block};
  with_logits(p.logits.dtype, [&](auto dtype) {
    constexpr int kDType = decltype(dtype)::value;
    if (block.y > 1) return launch(work, mixture_short_kernel<kDType>, shape, stream, p);
    const Slices slices = slices_of(p);
    shape.cluster = static_cast<unsigned>(slices.cluster);
    shape.grid.x *= shape.cluster;
    launch(work, diverges ? mixture_long_kernel<kDType, true> : mixture_long_kernel<kDType, false>, shape, stream, p,
           slices);
    if (apart) {
      // A sector of 32 bytes holds a token's logit, in DRAM where the logits do not fit into the L2 cache.
      const int64_t sectors = p.logits.dtype == kLogistic ? 0 : p.B * p.L * p.D * p.K * 32;
      launch({"mixture_positions (sequences)", p.B, p.L, p.D, p.S, sectors + sequences_bytes(p)},
             mixture_sequences_kernel<kDType>, grid_over(blocks, p.B), dim3(kMaxThreads), stream, p);
    }
  });
}

void mixture_finish(const MixtureArgs& p, int device, void* stream) {
  const DeviceGuard guard(device);
  if (p.B == 0) return;
  const dim3 block(kWarp, 4);
  launch({"mixture_finish", p.B, p.L, p.D, p.S, finish_bytes(p)}, mixture_finish_kernel,
         grid_for(p.B * (p.K + kParts), block.y), block, stream, p);
}

}  // namespace di4c::cuda
