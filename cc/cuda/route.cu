// Counts and places every (token, k), per destination and expert, in order: no atomics decide.
//
// One block. Each warp owns a run of consecutive entries and a histogram of its own over experts
// and destinations. Pass one counts; a scan over the warps turns counts into first places; pass two
// gives every entry its place, lanes with the same key ranked by lane.

#include <cuda_runtime.h>

#include "cc/cuda/device.cuh"
#include "cc/cuda/kernels.h"
#include "cc/cuda/launch.h"

namespace jax_sm_free::cuda {
namespace {

struct Entry {
  int32_t expert = -1;  // -1: none
  int32_t dst = -1;     // its rank, if this is the token's first entry for that rank, else -1
};

class Router {
 public:
  __device__ Router(const RankView& view, const RouteArgs& args, int32_t* histograms)
      : view_(view),
        args_(args),
        num_keys_(view.config.num_experts + view.config.ep_size),
        histogram_(histograms + threadIdx.x / kWarpSize * num_keys_),
        num_entries_(args.num_tokens * view.config.top_k) {
    const int64_t num_warps = blockDim.x / kWarpSize;
    const int64_t share = RoundUp((num_entries_ + num_warps - 1) / num_warps, kWarpSize);
    begin_ = threadIdx.x / kWarpSize * share;
    end_ = begin_ + share < num_entries_ ? begin_ + share : num_entries_;
  }

  __device__ void Count() {
    for (int64_t i = begin_ + threadIdx.x % kWarpSize; i < end_; i += kWarpSize) {
      const Entry entry = Read(i);
      if (entry.expert >= 0) atomicAdd(&histogram_[entry.expert], 1);
      if (entry.dst >= 0) atomicAdd(&histogram_[view_.config.num_experts + entry.dst], 1);
    }
  }

  __device__ void Place() {
    const int32_t num_experts = view_.config.num_experts;
    for (int64_t first = begin_; first < end_; first += kWarpSize) {
      const int64_t i = first + threadIdx.x % kWarpSize;
      const Entry entry = i < end_ ? Read(i) : Entry{};
      const int32_t place = Take(entry.expert);
      if (entry.expert >= 0) view_.place[i] = place;
      const int32_t row = Take(entry.dst < 0 ? -1 : num_experts + entry.dst);
      if (entry.dst >= 0) {
        view_.row_of[i / view_.config.top_k * view_.config.ep_size + entry.dst] = row;
      }
    }
  }

 private:
  // The next place of `key`, in lane order; all lanes of the warp call it.
  __device__ int32_t Take(int32_t key) {
    const int lane = threadIdx.x % kWarpSize;
    const unsigned same = __match_any_sync(kFullWarp, key);
    const int rank = __popc(same & ((1U << lane) - 1));
    const int32_t base = key < 0 ? 0 : histogram_[key];
    __syncwarp();
    if (key >= 0 && rank == 0) histogram_[key] = base + __popc(same);
    __syncwarp();
    return base + rank;
  }

  __device__ Entry Read(int64_t i) {
    const int32_t top_k = view_.config.top_k;
    const int32_t num_local = view_.config.num_local_experts();
    const int32_t k = static_cast<int32_t>(i % top_k);
    const int32_t* token = args_.topk_idx + (i - k);
    Entry entry{token[k], -1};
    if (entry.expert == -1) return entry;
    if (entry.expert < -1 || entry.expert >= view_.config.num_experts) {
      Raise(view_, args_.op, {FaultCode::kIndex, -1, view_.config.num_experts, entry.expert, i});
      view_.state->current.failed = max(view_.state->current.failed, int32_t{kEmpty});
      return Entry{};
    }
    entry.dst = OwnerRank(entry.expert, num_local);
    for (int32_t before = 0; before < k; ++before) {
      const int32_t expert = token[before];
      if (expert >= 0 && OwnerRank(expert, num_local) == entry.dst) {
        entry.dst = -1;
        break;
      }
    }
    return entry;
  }

  const RankView& view_;
  const RouteArgs& args_;
  const int32_t num_keys_;
  int32_t* const histogram_;
  const int64_t num_entries_;
  int64_t begin_;
  int64_t end_;
};

// Turns each warp's counts into its first places. Leaves the totals behind the histograms.
__device__ void ScanWarps(int32_t* histograms, int32_t num_keys, int32_t num_warps) {
  for (int32_t key = threadIdx.x; key < num_keys; key += blockDim.x) {
    int32_t total = 0;
    for (int32_t warp = 0; warp < num_warps; ++warp) {
      const int32_t count = histograms[warp * num_keys + key];
      histograms[warp * num_keys + key] = total;
      total += count;
    }
    histograms[num_warps * num_keys + key] = total;
  }
}

__device__ void WriteHeaders(const RankView& view, const RouteArgs& args, const int32_t* totals) {
  const Config& config = view.config;
  const Current current = view.state->current;
  const bool failed = current.failed != kOk;
  for (int32_t dst = threadIdx.x; dst < config.ep_size; dst += blockDim.x) {
    MessageHeader header;
    header.kind = failed ? kPoisonedKind : static_cast<int32_t>(args.kind);
    header.num_rows = failed ? 0 : totals[config.num_experts + dst];
    header.row_bytes = args.row_bytes;
    *PartOf<MessageHeader>(OutMessage(view, current.slot, dst), 0) = header;
  }
  if (failed || args.kind != Kind::kDispatch) return;
  for (int32_t expert = threadIdx.x; expert < config.num_experts; expert += blockDim.x) {
    const int32_t num_local = config.num_local_experts();
    std::byte* message = OutMessage(view, current.slot, OwnerRank(expert, num_local));
    // The parts before the routing arrays lie at the same place whatever the number of rows.
    PartOf<int32_t>(message, sizeof(MessageHeader))[LocalExpert(expert, num_local)] =
        totals[expert];
  }
}

__global__ void __launch_bounds__(1024) RouteKernel(const RankView view, const RouteArgs args) {
  extern __shared__ int32_t histograms[];
  if (args.writes_headers && view.state->current.failed == kNothing) return;
  const int32_t num_keys = view.config.num_experts + view.config.ep_size;
  const int32_t num_warps = blockDim.x / kWarpSize;
  for (int32_t i = threadIdx.x; i < num_keys * num_warps; i += blockDim.x) histograms[i] = 0;
  for (int64_t i = threadIdx.x; i < args.num_tokens * view.config.ep_size; i += blockDim.x) {
    view.row_of[i] = -1;
  }
  __syncthreads();
  Router router(view, args, histograms);
  router.Count();
  __syncthreads();
  ScanWarps(histograms, num_keys, num_warps);
  __syncthreads();
  router.Place();
  const int32_t* totals = histograms + num_warps * num_keys;
  for (int32_t dst = threadIdx.x; dst < view.config.ep_size; dst += blockDim.x) {
    view.state->routed_rows[dst] = totals[view.config.num_experts + dst];
  }
  if (args.writes_headers) WriteHeaders(view, args, totals);
}

constexpr int64_t kMaxSharedBytes = 200 * 1024;

}  // namespace

void LaunchRoute(const RankView& view, const RouteArgs& args, cudaStream_t stream) {
  const int64_t num_keys = view.config.num_experts + view.config.ep_size;
  const int64_t fit = kMaxSharedBytes / (num_keys * int64_t{sizeof(int32_t)}) - 1;
  const int num_warps = static_cast<int>(fit < 1 ? 1 : fit > 32 ? 32 : fit);
  const int64_t shared = num_keys * (num_warps + 1) * int64_t{sizeof(int32_t)};
  RouteKernel<<<1, num_warps * kWarpSize, shared, stream>>>(view, args);
}

cudaError_t LoadRoute() {
  return cudaFuncSetAttribute(RouteKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              kMaxSharedBytes);
}

}  // namespace jax_sm_free::cuda
