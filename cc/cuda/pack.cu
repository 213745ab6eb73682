// Token rows into messages: each row of x is read once, however many ranks it goes to.

#include <cuda_runtime.h>

#include "cc/cuda/device.cuh"
#include "cc/cuda/kernels.h"
#include "cc/cuda/launch.h"

namespace jax_sm_free::cuda {
namespace {

constexpr int kUnroll = 4;  // 16-byte loads of a lane in flight

// Where a token's row goes: its row in the message for each rank, -1 for none; one lane a rank.
class Targets {
 public:
  __device__ Targets(const RankView& view, const int32_t* row_of) : view_(view), row_of_(row_of) {}

  // Calls fn(dst, row) for each rank that gets the token, in all lanes.
  template <typename Fn>
  __device__ void ForEach(Fn fn) const {
    const int lane = threadIdx.x % kWarpSize;
    for (int32_t first = 0; first < view_.config.ep_size; first += kWarpSize) {
      const int32_t mine = first + lane < view_.config.ep_size ? row_of_[first + lane] : -1;
      unsigned present = __ballot_sync(kFullWarp, mine >= 0);
      while (present != 0) {
        const int source = __ffs(static_cast<int>(present)) - 1;
        present &= present - 1;
        fn(first + source, __shfl_sync(kFullWarp, mine, source));
      }
    }
  }

 private:
  const RankView& view_;
  const int32_t* row_of_;
};

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

// All rows are multiples of 16 bytes: lanes keep kUnroll loads in flight and store each to all
// ranks.
__device__ void PackWide(const Targets& targets, const OutRows* outs, const std::byte* in,
                         int64_t bytes) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t num_words = bytes / int64_t{sizeof(uint4)};
  const auto* source = reinterpret_cast<const uint4*>(in);
  for (int64_t first = 0; first < num_words; first += kUnroll * kWarpSize) {
    uint4 words[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = first + u * kWarpSize + lane;
      if (i < num_words) words[u] = __ldcs(source + i);
    }
    targets.ForEach([&](int32_t dst, int32_t row) {
      auto* out = reinterpret_cast<uint4*>(outs[dst].row(row));
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t i = first + u * kWarpSize + lane;
        if (i < num_words) out[i] = words[u];
      }
    });
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
    const bool wide = args.rows.scales_bytes == 0 && args.rows.values_bytes % 16 == 0;
    for (int64_t token = warps.index; token < args.num_tokens; token += warps.count) {
      const Targets targets(view, view.row_of + token * view.config.ep_size);
      const std::byte* values = args.rows.values + token * args.rows.values_bytes;
      if (wide) PackWide(targets, outs, values, args.rows.values_bytes);
      targets.ForEach([&](int32_t dst, int32_t row) {
        if (args.routed) PackRouting(view, args, token, outs[dst], dst, row);
        if (wide) return;
        std::byte* out = outs[dst].row(row);
        WarpCopy(out, values, args.rows.values_bytes);
        WarpCopy(out + args.rows.values_bytes, args.rows.scales + token * args.rows.scales_bytes,
                 args.rows.scales_bytes);
      });
    }
  }
  if (IsLastBlock(view.state) && threadIdx.x == 0) Post(view);
}

}  // namespace

void LaunchPack(const RankView& view, const PackArgs& args, cudaStream_t stream) {
  static const int blocks = RowBlocks(PackKernel, INT32_MAX);
  PackKernel<<<blocks, kRowThreads, 0, stream>>>(view, args);
}

cudaError_t LoadPack() { return Load(PackKernel); }

}  // namespace jax_sm_free::cuda
