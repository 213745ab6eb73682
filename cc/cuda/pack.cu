// Token rows into messages: each row of x is read once, however many ranks it goes to.

#include <cuda_runtime.h>

#include "cc/cuda/device.cuh"
#include "cc/cuda/kernels.h"
#include "cc/cuda/launch.h"

namespace jax_sm_free::cuda {
namespace {

constexpr int kUnroll = 4;  // 16-byte loads of a lane in flight

// A message being packed: its address and offsets.
struct OutRows {
  std::byte* message;
  int64_t rows;
  int64_t row_stride;
  int64_t local_expert;
  int64_t position;
  int64_t weight;

  __device__ std::byte* row(int64_t i) const { return message + rows + i * row_stride; }
};

__device__ OutRows OutRowsOf(const RankView& view, int32_t slot, int32_t dst) {
  std::byte* message = OutMessage(view, slot, dst);
  const MessageLayout layout = LayoutOf(view.config, HeaderOf(message));
  return {message,         layout.rows,  layout.row_stride, layout.local_expert,
          layout.position, layout.weight};
}

__device__ void PackRouting(const RankView& view, const PackArgs& args, int64_t token,
                            const OutRows& out, int32_t dst, int32_t row) {
  const int32_t top_k = view.config.top_k;
  const int32_t num_local = view.config.num_local_experts();
  const int k = threadIdx.x % kWarpSize;  // top_k is at most the size of a warp
  if (k >= top_k) return;
  const int64_t source = token * top_k + k;
  const int64_t entry = int64_t{row} * top_k + k;
  const int32_t expert = args.topk_idx[source];
  const bool here = expert >= 0 && OwnerRank(expert, num_local) == dst;
  PartOf<int32_t>(out.message, out.local_expert)[entry] =
      here ? LocalExpert(expert, num_local) : -1;
  PartOf<int32_t>(out.message, out.position)[entry] = here ? view.place[source] : 0;
  PartOf<float>(out.message, out.weight)[entry] = here ? args.topk_weights[source] : 0.0F;
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

// One segment of a token's row, to all ranks that get the token; the first also packs its routing.
__device__ void PackSegment(const RankView& view, const PackArgs& args, const OutRows* outs,
                            const Segments& segments, int64_t token, int32_t segment) {
  const int dst = threadIdx.x % kWarpSize;  // a lane for each rank
  const int32_t ep_size = view.config.ep_size;
  const int32_t row = dst < ep_size ? view.row_of[token * ep_size + dst] : -1;
  std::byte* target = row >= 0 ? outs[dst].row(row) : nullptr;
  const unsigned present = __ballot_sync(kFullWarp, row >= 0);
  const std::byte* values = args.rows.values + token * args.rows.values_bytes;
  const bool wide = args.rows.scales_bytes == 0 && args.rows.values_bytes % 16 == 0;
  if (wide) PackWords(present, target, values, segments.begin(segment), segments.end(segment));
  if (segment > 0 || (wide && !args.routed)) return;
  for (unsigned left = present; left != 0; left &= left - 1) {
    const int to = __ffs(static_cast<int>(left)) - 1;
    const int32_t to_row = __shfl_sync(kFullWarp, row, to);
    if (args.routed) PackRouting(view, args, token, outs[to], to, to_row);
    if (wide) continue;
    std::byte* out = outs[to].row(to_row);
    WarpCopy(out, values, args.rows.values_bytes);
    WarpCopy(out + args.rows.values_bytes, args.rows.scales + token * args.rows.scales_bytes,
             args.rows.scales_bytes);
  }
}

__global__ void __launch_bounds__(kRowThreads)
    PackKernel(const RankView view, const PackArgs args) {
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
    const int64_t num_items = args.num_tokens * segments.per_row;
    for (int64_t item = warps.index; item < num_items; item += warps.count) {
      const int64_t token = item / segments.per_row;
      PackSegment(view, args, outs, segments, token,
                  static_cast<int32_t>(item - token * segments.per_row));
    }
  }
  if (!IsLastBlock(view.state) || threadIdx.x != 0 || current.failed == kNothing) return;
  for (int32_t i = 1; i <= view.config.ep_size; ++i) {
    Post(view, (view.rank + i) % view.config.ep_size);  // ranks start at different peers
  }
}

}  // namespace

void LaunchPack(const RankView& view, const PackArgs& args, cudaStream_t stream) {
  static const int blocks = RowBlocks(PackKernel, INT32_MAX);
  PackKernel<<<blocks, kRowThreads, 0, stream>>>(view, args);
}

cudaError_t LoadPack() { return Load(PackKernel); }

}  // namespace jax_sm_free::cuda
