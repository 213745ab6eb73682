// Counts and places the rows of rail messages, for each place of this node, in order: what route.cu
// does for tokens.
//
// The rows of each node are divided into tiles. `ForwardCount` makes a histogram of each tile over
// the places of this node. Its last block turns the histograms into the first row of each place in
// each tile. `ForwardPlace` ranks the entries of a tile, by tile, warp and lane. A row of a rail
// message that goes to several experts of a rank goes there once.

#include <cuda_runtime.h>

#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/forward.cuh"
#include "cc/cuda/kernels/kernels.h"
#include "cc/cuda/kernels/launch.h"
#include "cc/cuda/kernels/tile.cuh"
#include "cc/cuda/rank_view.h"

namespace jax_sm_free::cuda {
namespace {

__device__ bool IsDispatch(const ForwardRouteArgs& args) { return args.op == Op::kDispatchForward; }

// The counts of a tile: of rows for each place, and then the end of the rows in use.
__host__ __device__ int32_t NumCounts(const Config& config) { return config.node_size() + 1; }

__host__ __device__ int32_t TilesOfNode(const RankView& view) {
  return (view.config.max_tokens + view.tile_tokens - 1) / view.tile_tokens;
}

// The counts of tile `index` of a node. The totals lie behind those of the last tile.
__device__ int32_t* CountsOf(const RankView& view, int32_t node, int32_t index) {
  const int64_t tile = int64_t{node} * (TilesOfNode(view) + 1) + index;
  return view.tile_counts + tile * NumCounts(view.config);
}

// The tile of a block.
struct RailTile {
  int32_t node;
  int32_t other;       // the place of the node among the other nodes; -1 for the own node
  int32_t index;       // of the tile within the node
  const int32_t* idx;  // node experts [rows, top_k]
  int64_t num_rows;    // of the node; rows at the end may have no expert

  __device__ RailTile(const RankView& view, const ForwardRouteArgs& args) {
    const int32_t own = NodeOf(view.config, view.rank);
    node = static_cast<int32_t>(blockIdx.x) / TilesOfNode(view);
    index = static_cast<int32_t>(blockIdx.x) % TilesOfNode(view);
    other = node == own ? -1 : AmongOthers(own, node);
    idx = nullptr;
    num_rows = 0;
    if (other < 0) return;
    if (!IsDispatch(args)) {
      idx = args.node_topk + FirstRailRow(view, node) * view.config.top_k;
      num_rows = view.config.max_tokens;
      return;
    }
    const Current current = view.state->current;
    if (current.failed != kOk) return;
    std::byte* message = InMessage(view, current.slot, view.config.ep_size + other);
    idx = PartOf<int32_t>(message, LayoutOf(view.config, HeaderOf(message)).local_expert);
    num_rows = view.state->num_rows[other];
  }
};

// Writes node_topk for the rows of a tile.
__device__ void WriteNodeTopk(const RankView& view, const RailTile& rail, int32_t* node_topk) {
  const int32_t top_k = view.config.top_k;
  const int64_t first = int64_t{rail.index} * view.tile_tokens;
  const int64_t end = min(first + view.tile_tokens, int64_t{view.config.max_tokens});
  int32_t* out = node_topk + FirstRailRow(view, rail.node) * top_k;
  for (int64_t i = first * top_k + threadIdx.x; i < end * top_k; i += blockDim.x) {
    out[i] = i < rail.num_rows * top_k ? rail.idx[i] : -1;
  }
}

// Raises a fault for the first node expert that does not exist, if there is one.
__device__ void RaiseBadEntry(const RankView& view, const ForwardRouteArgs& args) {
  DeviceState* state = view.state;
  const unsigned long long bad = state->bad_entry;
  if (bad == 0) return;
  state->bad_entry = 0;
  const auto entry = static_cast<int64_t>(~bad);
  const int32_t seen = IsDispatch(args) ? args.node_topk_out[entry] : args.node_topk[entry];
  Raise(view, args.op, {FaultCode::kIndex, -1, 0, seen, entry});
  if (IsDispatch(args) && state->current.failed == kOk) state->current.failed = kEmpty;
}

// Runs after the counts of all tiles. One block calls this.
__device__ void EndCount(const RankView& view, const ForwardRouteArgs& args) {
  constexpr int kUnroll = 32;  // tiles that are read in one round trip to memory
  const int32_t num_counts = NumCounts(view.config);
  const int32_t num_tiles = TilesOfNode(view);
  const int32_t num_others = view.config.num_nodes - 1;
  if (threadIdx.x == 0) RaiseBadEntry(view, args);
  for (int32_t i = threadIdx.x; i < num_others * num_counts; i += blockDim.x) {
    const int32_t other = i / num_counts;
    const int32_t key = i % num_counts;
    const bool is_end = key == num_counts - 1;
    int32_t* column = CountsOf(view, OtherNode(NodeOf(view.config, view.rank), other), 0) + key;
    int32_t total = 0;
    for (int32_t first = 0; first < num_tiles; first += kUnroll) {
      int32_t counts[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (first + u < num_tiles) counts[u] = __ldcg(column + int64_t{first + u} * num_counts);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (first + u >= num_tiles) break;
        column[int64_t{first + u} * num_counts] = total;
        total = is_end ? max(total, counts[u]) : total + counts[u];
      }
    }
    if (is_end) {
      view.state->rail_rows[other] = total;
    } else {
      view.state->routed_rows[other * (num_counts - 1) + key] = total;
    }
  }
}

__global__ void __launch_bounds__(kTileEntries)
    ForwardCountKernel(const RankView view, const ForwardRouteArgs args) {
  __shared__ int32_t counts[kMaxRanks + 1];
  AwaitPrevious();
  AdmitNext();
  const int32_t num_counts = NumCounts(view.config);
  const int32_t end_key = num_counts - 1;
  const RailTile rail(view, args);
  for (int32_t i = threadIdx.x; i < num_counts; i += blockDim.x) counts[i] = 0;
  if (IsDispatch(args)) WriteNodeTopk(view, rail, args.node_topk_out);
  __syncthreads();
  const Tile tile(view, rail.num_rows, rail.index);
  const Entry entry = tile.Read(rail.idx, PlaceRouter(view), view.rank, false);
  if (entry.bad) {
    const auto first = FirstRailRow(view, rail.node) * view.config.top_k;
    atomicMax(&view.state->bad_entry, ~(static_cast<unsigned long long>(first) + tile.entry()));
  }
  if (entry.dst >= 0) {
    atomicAdd(&counts[entry.dst], 1);
    atomicMax(&counts[end_key], static_cast<int32_t>(tile.token()) + 1);
  }
  __syncthreads();
  int32_t* out = CountsOf(view, rail.node, rail.index);
  for (int32_t i = threadIdx.x; i < num_counts; i += blockDim.x) out[i] = counts[i];
  if (IsLastBlock(view.state)) EndCount(view, args);
}

// Where the routing of a row lies in a rail message, or in a message that a forward makes of it.
struct Routing {
  int32_t* local_expert;
  int32_t* position;
  float* weight;
};
__device__ Routing RoutingOf(const RankView& view, std::byte* message,
                             const MessageHeader& header) {
  const MessageLayout layout = LayoutOf(view.config, header);
  return {PartOf<int32_t>(message, layout.local_expert), PartOf<int32_t>(message, layout.position),
          PartOf<float>(message, layout.weight)};
}

// Writes the routing of one (row, k) into the messages for all places that get the row.
__device__ void WriteRouting(const RankView& view, const Routing& rail, const Routing* outs,
                             const int32_t* rows, int64_t rail_entry, int32_t k,
                             const Entry& expert) {
  const int32_t node_size = view.config.node_size();
  const int32_t top_k = view.config.top_k;
  const int32_t position = rail.position[rail_entry];
  const float weight = rail.weight[rail_entry];
  for (int32_t place = 0; place < node_size; ++place) {
    const int32_t row = rows[place];
    if (row < 0) continue;
    const bool here = expert.lane == place;
    const int64_t entry = int64_t{row} * top_k + k;
    outs[place].local_expert[entry] = here ? expert.local : -1;
    outs[place].position[entry] = here ? position : 0;
    outs[place].weight[entry] = here ? weight : 0.0F;
  }
}

__global__ void __launch_bounds__(kTileEntries)
    ForwardPlaceKernel(const RankView view, const ForwardRouteArgs args) {
  constexpr int kMaxWarps = kTileEntries / kWarpSize;
  __shared__ int32_t places[kMaxWarps][kMaxRanks];  // counts, and then first rows
  __shared__ Routing outs[kMaxRanks];
  AwaitPrevious();
  AdmitNext();
  const Config& config = view.config;
  const int32_t node_size = config.node_size();
  const RailTile rail(view, args);
  const Tile tile(view, rail.num_rows, rail.index);
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  places[warp][lane] = 0;
  int32_t* row_of = view.row_of + FirstRailRow(view, rail.node) * node_size;
  for (int32_t i = threadIdx.x; i < tile.num_tokens() * node_size; i += blockDim.x) {
    row_of[tile.first_token() * node_size + i] = -1;
  }
  const Current current = view.state->current;
  const bool routes = IsDispatch(args) && current.failed == kOk && rail.other >= 0;
  for (int32_t place = threadIdx.x; routes && place < node_size; place += blockDim.x) {
    std::byte* message = OutMessage(view, current.slot, ForOtherNode(view, rail.other, place));
    outs[place] = RoutingOf(view, message, SpreadHeader(view, args.op, rail.other, place));
  }
  // Read has a barrier. Behind it, all threads see the zeros.
  const Entry entry = tile.Read(rail.idx, PlaceRouter(view), view.rank, false);
  const unsigned same = __match_any_sync(kFullWarp, entry.dst);
  const int32_t before = __popc(same & ((1U << lane) - 1));
  if (entry.dst >= 0 && before == 0) places[warp][entry.dst] = __popc(same);
  __syncthreads();
  for (int32_t place = threadIdx.x; place < node_size; place += blockDim.x) {
    int32_t next = CountsOf(view, rail.node, rail.index)[place];
    for (int32_t w = 0; w < static_cast<int32_t>(blockDim.x) / kWarpSize; ++w) {
      const int32_t count = places[w][place];
      places[w][place] = next;
      next += count;
    }
  }
  __syncthreads();
  const auto in_tile = static_cast<int32_t>(threadIdx.x);
  const bool in_use = in_tile < tile.num_tokens() * config.top_k;
  if (in_use && entry.dst >= 0) {
    row_of[tile.token() * node_size + entry.dst] = places[warp][entry.dst] + before;
  }
  if (!routes) return;
  __syncthreads();
  if (!in_use) return;
  std::byte* message = InMessage(view, current.slot, config.ep_size + rail.other);
  WriteRouting(view, RoutingOf(view, message, HeaderOf(message)), outs,
               row_of + tile.token() * node_size, static_cast<int64_t>(tile.entry()),
               in_tile % config.top_k, entry);
}

}  // namespace

void LaunchForwardRoute(const RankView& view, const ForwardRouteArgs& args, cudaStream_t stream) {
  const Grid grid{view.config.num_nodes * TilesOfNode(view), TileWarps(view.config) * kWarpSize};
  args.is_first ? Enqueue(ForwardCountKernel, grid, stream, view, args)
                : EnqueueBehind(ForwardCountKernel, grid, stream, view, args);
  EnqueueBehind(ForwardPlaceKernel, grid, stream, view, args);
}

cudaError_t LoadForwardRoute() {
  const cudaError_t error = Load(ForwardCountKernel);
  return error == cudaSuccess ? Load(ForwardPlaceKernel) : error;
}

}  // namespace jax_sm_free::cuda
