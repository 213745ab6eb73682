// Counts and places every (token, k), for each destination and each expert, in order. No place
// depends on the order of atomics.
//
// In two tiers, destinations are the ranks of the own node and the rail peers (tile.cuh).
//
// Tokens are divided into tiles. A block handles a tile, and a thread handles an entry, which is a
// (token, k). `Count` makes a histogram of each tile over its keys: experts, then destinations,
// then one key for common tokens. (Without weights, nothing depends on experts, and they have no
// keys.) The last block of `Count` turns the histograms into the first place of each key in each
// tile. `Place` ranks the entries of a tile, by tile, warp and lane.
//
// In a send, both kernels have one more block for work that involves other ranks: it opens the
// exchange during `Count`, and sends the notices during `Place`. `Place` may start during `Count`,
// with everything that does not need the first places.

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "cc/cuda/kernels/begin.cuh"
#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/kernels.h"
#include "cc/cuda/kernels/launch.h"
#include "cc/cuda/kernels/post.cuh"
#include "cc/cuda/kernels/routing_out.cuh"
#include "cc/cuda/kernels/tile.cuh"
#include "cc/cuda/rank_view.h"

namespace jax_sm_free::cuda {
namespace {

__host__ __device__ bool IsSend(const RouteArgs& args) { return args.begin.has_value(); }

__device__ int32_t NumTiles(const RouteArgs& args) {
  return static_cast<int32_t>(gridDim.x) - (IsSend(args) ? 1 : 0);
}

// The op says so, and not the weights: without tokens, the pointer to the weights may be null.
__device__ bool IsDispatch(const RouteArgs& args) { return args.op == Op::kDispatchSend; }

__device__ int32_t FirstKey(const RankView& view, const RouteArgs& args) {
  return IsDispatch(args) ? 0 : view.config.num_experts;
}

// Keys are experts first, then destinations, then this one.
__device__ int32_t CommonKey(const RankView& view) { return NumKeys(view) - 1; }

// Rows that go to all ranks are staged once in one tier only.
template <typename Router>
__device__ bool FindsCommon(const RouteArgs& args) {
  return std::is_same_v<Router, FlatRouter> && IsDispatch(args);
}

// Raises a fault for the first index that is out of range, if there is one.
__device__ void RaiseBadEntry(const RankView& view, const RouteArgs& args) {
  DeviceState* state = view.state;
  const unsigned long long bad = state->bad_entry;
  if (bad == 0) return;
  const auto entry = static_cast<int64_t>(~bad);
  Raise(view, args.op, {FaultCode::kIndex, -1, 0, args.topk.idx[entry], entry});
  // In a recv, the exchange is taken later, or at the same time.
  if (IsSend(args) && state->current.failed == kOk) state->current.failed = kEmpty;
  state->bad_entry = 0;
}

// Writes the headers of all messages. One block calls this.
__device__ void WriteHeaders(const RankView& view, const RouteArgs& args, const int32_t* totals) {
  const Config& config = view.config;
  const int64_t first_part =
      FirstPartTokens(view.tile_tokens, args.topk.num_tokens, args.row_bytes);
  const int64_t first_tile = first_part / view.tile_tokens;
  const int32_t* first_places = view.tile_counts + first_tile * NumKeys(view);
  const bool failed = view.state->current.failed != kOk;
  const int32_t num_common = totals[CommonKey(view)];
  const bool stages_once = !failed && StagesOnce(config, num_common, args.topk.num_tokens);
  for (int32_t lane = threadIdx.x; lane < view.messages.num_lanes; lane += blockDim.x) {
    const int32_t message = view.messages.of_lane[lane];
    MessageHeader header;
    header.kind = failed ? kPoisonedKind : static_cast<int32_t>(KindOf(args.op));
    header.num_rows = failed ? 0 : totals[config.num_experts + lane];
    header.row_bytes = args.row_bytes;
    header.num_tokens = args.topk.num_tokens;
    header.first_part = failed ? 0 : first_places[config.num_experts + lane];
    if (stages_once && message != view.rank) {
      header.num_common = num_common;
      header.first_common = first_places[CommonKey(view)];
    }
    WriteHeader(view, message, header);
  }
}

// Sends the notices of all messages, with the number of rows for each expert. One block calls this.
template <typename Router>
__device__ void SendNotices(const RankView& view, const RouteArgs& args, const int32_t* totals) {
  const Config& config = view.config;
  const Current current = view.state->current;
  if (current.failed == kNothing) return;
  const bool failed = current.failed != kOk;
  const Router router(view);
  const int32_t num_counted = config.num_experts - FirstKey(view, args);
  for (int32_t key = threadIdx.x; key < num_counted; key += blockDim.x) {
    const Entry expert = router.OfKey(key);
    const OtherEnd& end = EndOf(view, view.messages.of_lane[expert.lane]);
    std::byte* notice = Notice(view, end.rank, current.slot, end.message);
    RowsPerExpert(notice)[expert.local] = failed ? 0 : totals[key];
  }
  __syncthreads();
  for (int32_t lane = threadIdx.x; lane < view.messages.num_lanes; lane += blockDim.x) {
    SendNotice(view, view.messages.of_lane[lane]);
  }
}

// Turns the counts of the tiles into first places, and writes the totals behind them. One block
// calls this.
__device__ void ScanTiles(const RankView& view, int32_t first_key, int32_t num_tiles) {
  constexpr int kUnroll = 32;  // tiles that are read in one round trip to memory
  const int32_t num_keys = NumKeys(view);
  for (int32_t key = first_key + threadIdx.x; key < num_keys; key += blockDim.x) {
    int32_t* column = view.tile_counts + key;
    int32_t total = 0;
    for (int32_t first = 0; first < num_tiles; first += kUnroll) {
      int32_t counts[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (first + u < num_tiles) counts[u] = __ldcg(column + int64_t{first + u} * num_keys);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (first + u >= num_tiles) break;
        column[int64_t{first + u} * num_keys] = total;
        total += counts[u];
      }
    }
    column[int64_t{num_tiles} * num_keys] = total;
  }
}

// Makes the histogram of this block's tile.
template <typename Router>
__device__ void CountTile(const RankView& view, const RouteArgs& args) {
  auto* histogram = DynamicShared<int32_t>();  // [num_keys]
  const int32_t num_keys = NumKeys(view);
  const int32_t num_experts = view.config.num_experts;
  const int32_t first_key = FirstKey(view, args);
  for (int32_t key = first_key + threadIdx.x; key < num_keys; key += blockDim.x) histogram[key] = 0;
  __syncthreads();
  const Tile tile(view, args.topk.num_tokens, static_cast<int32_t>(blockIdx.x));
  const Entry entry = tile.Read(args.topk.idx, Router(view), view.rank, FindsCommon<Router>(args));
  // The complement: 0 stands for none, and the first bad entry is the largest.
  if (entry.bad) atomicMax(&view.state->bad_entry, ~tile.entry());
  if (entry.expert >= first_key) atomicAdd(&histogram[entry.expert], 1);
  if (entry.dst >= 0) atomicAdd(&histogram[num_experts + entry.dst], 1);
  if (entry.is_common) atomicAdd(&histogram[CommonKey(view)], 1);
  __syncthreads();
  for (int32_t key = first_key + threadIdx.x; key < num_keys; key += blockDim.x) {
    view.tile_counts[int64_t{blockIdx.x} * num_keys + key] = histogram[key];
  }
}

// Runs after the histograms of all tiles. One block calls this.
__device__ void EndCount(const RankView& view, const RouteArgs& args) {
  const int32_t num_tiles = NumTiles(args);
  if (threadIdx.x == 0) RaiseBadEntry(view, args);
  ScanTiles(view, FirstKey(view, args), num_tiles);
  __syncthreads();
  const int32_t* totals = view.tile_counts + int64_t{num_tiles} * NumKeys(view);
  for (int32_t lane = threadIdx.x; lane < view.messages.num_lanes; lane += blockDim.x) {
    view.state->routed_rows[lane] = totals[view.config.num_experts + lane];
  }
  if (IsSend(args) && view.state->current.failed != kNothing) WriteHeaders(view, args, totals);
}

template <typename Router>
__global__ void __launch_bounds__(kTileEntries)
    CountKernel(const RankView view, const RouteArgs args) {
  AdmitNext();
  CountTile<Router>(view, args);
  if (IsLastBlock(view.state)) EndCount(view, args);
}

// Tools that read profiles recognise the beginning of an exchange by the name of this kernel.
template <typename Router>
__global__ void __launch_bounds__(kTileEntries)
    BeginAndCountKernel(const RankView view, const RouteArgs args) {
  if (static_cast<int32_t>(blockIdx.x) < NumTiles(args)) {
    AdmitNext();
    CountTile<Router>(view, args);
  } else {
    Begin(view, args.op, *args.begin);
    AdmitNext();
  }
  if (IsLastBlock(view.state)) EndCount(view, args);
}

// The number of threads with the same key before this one in the warp, and the set of these
// threads.
struct Rank {
  int32_t rank;
  int32_t count;
};
__device__ Rank RankInWarp(int32_t key) {
  const unsigned same = __match_any_sync(kFullWarp, key);
  const unsigned before = (1U << (threadIdx.x % kWarpSize)) - 1;
  return {__popc(same & before), __popc(same)};
}

template <typename Router>
__global__ void __launch_bounds__(kTileEntries)
    PlaceKernel(const RankView view, const RouteArgs args) {
  auto* histograms = DynamicShared<int32_t>();  // [warps, num_keys]
  const Config& config = view.config;
  const int32_t num_keys = NumKeys(view);
  const int32_t num_lanes = view.messages.num_lanes;
  const int32_t num_tiles = NumTiles(args);
  AdmitNext();
  if (static_cast<int32_t>(blockIdx.x) == num_tiles) {
    AwaitPrevious();
    SendNotices<Router>(view, args, view.tile_counts + int64_t{num_tiles} * num_keys);
    return;
  }
  const auto num_warps = static_cast<int32_t>(blockDim.x / kWarpSize);
  const int32_t first_key = FirstKey(view, args);
  const int32_t num_used = num_keys - first_key;
  int32_t* own = histograms + threadIdx.x / kWarpSize * num_used - first_key;  // by key
  for (int32_t i = threadIdx.x; i < num_used * num_warps; i += blockDim.x) histograms[i] = 0;
  const Tile tile(view, args.topk.num_tokens, static_cast<int32_t>(blockIdx.x));
  for (int32_t i = threadIdx.x; i < tile.num_tokens() * num_lanes; i += blockDim.x) {
    view.row_of[tile.first_token() * num_lanes + i] = -1;
  }
  // Read has a barrier. Behind it, all threads see the zeros.
  const Entry entry = tile.Read(args.topk.idx, Router(view), view.rank, FindsCommon<Router>(args));
  const int32_t dst_key = entry.dst < 0 ? -1 : config.num_experts + entry.dst;
  const Rank expert_rank = RankInWarp(entry.expert);
  const Rank dst_rank = RankInWarp(dst_key);
  if (entry.expert >= first_key && expert_rank.rank == 0) own[entry.expert] = expert_rank.count;
  if (dst_key >= 0 && dst_rank.rank == 0) own[dst_key] = dst_rank.count;
  const unsigned common = __ballot_sync(kFullWarp, entry.is_common);
  const int lane = threadIdx.x % kWarpSize;
  if (lane == 0) own[CommonKey(view)] = __popc(common);
  AwaitPrevious();  // `Count` neither writes what was read here, nor reads what was written here.
  const Current current = view.state->current;
  const bool routed = IsDispatch(args) && current.failed == kOk;
  __shared__ RoutingOut outs[kMaxRanks];
  for (int32_t lane = threadIdx.x; routed && lane < num_lanes; lane += blockDim.x) {
    outs[lane] = RoutingOf(view, view.messages.of_lane[lane]);
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < num_used; i += blockDim.x) {
    int32_t place = view.tile_counts[int64_t{blockIdx.x} * num_keys + first_key + i];
    for (int32_t warp = 0; warp < num_warps; ++warp) {
      const int32_t count = histograms[warp * num_used + i];
      histograms[warp * num_used + i] = place;
      place += count;
    }
  }
  __syncthreads();
  const auto in_tile = static_cast<int32_t>(threadIdx.x);
  const bool in_use = in_tile < tile.num_tokens() * config.top_k;
  const int32_t row = dst_key < 0 ? -1 : own[dst_key] + dst_rank.rank;
  if (row >= 0) view.row_of[tile.token() * num_lanes + entry.dst] = row;
  if (routed && in_use && in_tile % config.top_k == 0) {
    const int32_t before = own[CommonKey(view)] + __popc(common & ((1U << lane) - 1));
    view.common_before[tile.token()] = CommonBefore{before, entry.is_common}.number();
  }
  if (!routed) return;
  __syncthreads();
  if (!in_use) return;
  const CommonBefore before = CommonBefore::Of(view.common_before[tile.token()]);
  if (row >= 0) {
    const int32_t message = view.messages.of_lane[entry.dst];
    WriteNumber(view, outs[entry.dst], message, row, before, tile.token());
  }
  WriteRouting(view, args, outs, before, tile.token(), in_tile % config.top_k, entry,
               own[max(entry.expert, 0)] + expert_rank.rank);
}

constexpr int kMaxSharedBytes = 160 * 1024;

int64_t PlaceSharedBytes(const Config& config) {
  return int64_t{NumKeys(config)} * TileWarps(config) * int64_t{sizeof(int32_t)};
}

template <typename Router>
void Launch(const RankView& view, const RouteArgs& args, cudaStream_t stream) {
  const int64_t tile_tokens = view.tile_tokens;
  const auto tiles = static_cast<int>((args.topk.num_tokens + tile_tokens - 1) / tile_tokens);
  // Headers are written even if there are no tokens.
  const int blocks = std::max(tiles, 1) + (IsSend(args) ? 1 : 0);
  const int threads = TileWarps(view.config) * kWarpSize;
  const auto count_bytes = NumKeys(view.config) * sizeof(int32_t);
  const auto place_bytes = static_cast<size_t>(PlaceSharedBytes(view.config));
  const auto count = IsSend(args) ? BeginAndCountKernel<Router> : CountKernel<Router>;
  Enqueue(count, {blocks, threads, count_bytes}, stream, view, args);
  EnqueueBehind(PlaceKernel<Router>, {blocks, threads, place_bytes}, stream, view, args);
}

template <typename Router>
cudaError_t LoadFor() {
  for (const auto kernel :
       {CountKernel<Router>, BeginAndCountKernel<Router>, PlaceKernel<Router>}) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

void LaunchRoute(const RankView& view, const RouteArgs& args, cudaStream_t stream) {
  view.config.has_two_tiers() ? Launch<TierRouter>(view, args, stream)
                              : Launch<FlatRouter>(view, args, stream);
}

cudaError_t LoadRoute() {
  const cudaError_t error = LoadFor<FlatRouter>();
  return error == cudaSuccess ? LoadFor<TierRouter>() : error;
}

}  // namespace jax_sm_free::cuda
