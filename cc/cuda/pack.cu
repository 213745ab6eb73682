// Token rows into messages: each row of x is read once, however many ranks it goes to.

#include <cuda_runtime.h>

#include "cc/cuda/device.cuh"
#include "cc/cuda/kernels.h"
#include "cc/cuda/launch.h"

namespace jax_sm_free::cuda {
namespace {

constexpr int kUnroll = 8;  // 16-byte loads of a lane in flight

// Where the rows of a message being packed lie.
struct OutRows {
  std::byte* rows;
  int64_t row_stride;

  __device__ std::byte* row(int64_t i) const { return rows + i * row_stride; }
};

__device__ OutRows OutRowsOf(const RankView& view, int32_t slot, int32_t dst) {
  std::byte* message = OutMessage(view, slot, dst);
  const MessageLayout layout = LayoutOf(view.config, HeaderOf(message));
  return {message + layout.rows, layout.row_stride};
}

// Words [first, end) of a row: lanes keep kUnroll loads in flight and store each word to all
// targets. `target` is this lane's; `present` says which lanes have one.
__device__ void PackWords(unsigned present, std::byte* target, const std::byte* in, int32_t first,
                          int32_t end) {
  const int lane = threadIdx.x % kWarpSize;
  const auto* source = reinterpret_cast<const uint4*>(in) + lane;
  for (; first < end; first += kUnroll * kWarpSize) {
    uint4 words[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int32_t i = first + u * kWarpSize;
      if (i + lane < end) words[u] = __ldcs(source + i);
    }
    for (unsigned left = present; left != 0; left &= left - 1) {
      const int from = __ffs(static_cast<int>(left)) - 1;
      auto* out = reinterpret_cast<uint4*>(ShufflePointer(target, from)) + lane;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int32_t i = first + u * kWarpSize;
        if (i + lane < end) __stcs(out + i, words[u]);
      }
    }
  }
}

// One segment of a token's row, to all ranks that get the token.
__device__ void PackSegment(const RankView& view, const PackArgs& args, const OutRows* outs,
                            const Segments& segments, int64_t token, int32_t segment) {
  const int dst = threadIdx.x % kWarpSize;  // a lane for each rank
  const int32_t ep_size = view.config.ep_size;
  const int32_t row = dst < ep_size ? view.row_of[token * ep_size + dst] : -1;
  std::byte* target = row >= 0 ? outs[dst].row(row) : nullptr;
  const unsigned present = __ballot_sync(kFullWarp, row >= 0);
  const std::byte* values = args.rows.values + token * args.rows.values_bytes;
  if (args.rows.scales_bytes == 0 && args.rows.values_bytes % 16 == 0) {
    PackWords(present, target, values, segments.begin(segment), segments.end(segment));
    return;
  }
  for (unsigned left = present; left != 0; left &= left - 1) {
    std::byte* out = ShufflePointer(target, __ffs(static_cast<int>(left)) - 1);
    WarpCopy(out, values, args.rows.values_bytes);
    WarpCopy(out + args.rows.values_bytes, args.rows.scales + token * args.rows.scales_bytes,
             args.rows.scales_bytes);
  }
}

// Posts a part of all messages; what lies before the rows goes with the first. By one thread.
__device__ void PostPart(const RankView& view, int part) {
  const Current current = view.state->current;
  for (int32_t i = 1; i <= view.config.ep_size; ++i) {
    const int32_t dst = (view.rank + i) % view.config.ep_size;  // ranks start at different peers
    if (current.failed != kOk) {
      if (part == kLastPart) Post(view, dst);
      continue;
    }
    const MessageHeader& header = HeaderOf(OutMessage(view, current.slot, dst));
    const MessageLayout layout = LayoutOf(view.config, header);
    const int64_t middle = layout.rows + header.first_part * layout.row_stride;
    PostBytes(view, dst, part, part == 0 ? 0 : middle, part == 0 ? middle : layout.total);
  }
}

// One part of the tokens, [first, end).
__global__ void __launch_bounds__(kRowThreads)
    PackKernel(const RankView view, const PackArgs args, const int part, const int64_t first,
               const int64_t end) {
  __shared__ OutRows outs[kMaxRanks];
  const Current current = view.state->current;
  if (current.failed == kOk) {
    for (int32_t dst = threadIdx.x; dst < view.config.ep_size; dst += blockDim.x) {
      outs[dst] = OutRowsOf(view, current.slot, dst);
    }
    __syncthreads();
    const Warps warps = WarpsOfGrid();
    const bool one_part = args.rows.scales_bytes == 0;
    const Segments segments(one_part ? args.rows.values_bytes : 1);
    const int64_t num_items = (end - first) * segments.per_row;
    for (int64_t item = warps.index; item < num_items; item += warps.count) {
      const int64_t token = item / segments.per_row;
      PackSegment(view, args, outs, segments, first + token,
                  static_cast<int32_t>(item - token * segments.per_row));
    }
  }
  if (current.failed == kNothing) return;
  if (IsLastBlock(view.state) && threadIdx.x == 0) PostPart(view, part);
}

}  // namespace

void LaunchPack(const RankView& view, const PackArgs& args, cudaStream_t stream) {
  static const int blocks = RowBlocks(PackKernel, INT32_MAX);
  const int64_t middle = FirstPartTokens(view.config, args.num_tokens);
  PackKernel<<<blocks, kRowThreads, 0, stream>>>(view, args, 0, 0, middle);
  PackKernel<<<blocks, kRowThreads, 0, stream>>>(view, args, kLastPart, middle, args.num_tokens);
}

cudaError_t LoadPack() { return Load(PackKernel); }

}  // namespace jax_sm_free::cuda
