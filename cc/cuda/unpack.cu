// A dispatch's rows out of their messages: into expert groups, or token by token.

#include <cuda_runtime.h>

#include "cc/cuda/device.cuh"
#include "cc/cuda/kernels.h"
#include "cc/cuda/launch.h"

namespace jax_sm_free::cuda {
namespace {

constexpr int kPlanThreads = 256;
constexpr int kUnroll = 8;         // 16-byte loads of a lane in flight
constexpr uint8_t kPoison = 0xFF;  // NaN in every float type, -1 in every integer type

// A received token row: which message it lies in, and where.
struct TokenRow {
  int32_t source;
  int32_t row;  // within the message
  std::byte* message;
  MessageLayout layout;

  __device__ const std::byte* bytes() const {
    return message + layout.rows + row * layout.row_stride;
  }
};

__device__ TokenRow FindRow(const RankView& view, int64_t i) {
  const DeviceState* state = view.state;
  TokenRow found;
  found.source = 0;
  while (i >= state->first_row[found.source + 1]) ++found.source;
  found.row = static_cast<int32_t>(i - state->first_row[found.source]);
  found.message = InMessage(view, state->current.slot, found.source);
  found.layout = LayoutOf(view.config, HeaderOf(found.message));
  return found;
}

__device__ void SplitRow(const TokenRow& from, const MutableRows& out, int64_t row) {
  WarpCopy(out.values + row * out.values_bytes, from.bytes(), out.values_bytes);
  WarpCopy(out.scales + row * out.scales_bytes, from.bytes() + out.values_bytes, out.scales_bytes);
}

__device__ void FillRow(const MutableRows& out, int64_t row, uint8_t value) {
  WarpFill(out.values + row * out.values_bytes, value, out.values_bytes);
  WarpFill(out.scales + row * out.scales_bytes, value, out.scales_bytes);
}

// ---------------------------------------------------------------------------------------- experts

// Rows that groups take when each keeps its first `level`; all threads of the block get the sum.
__device__ int64_t BlockRowsAtLevel(const Config& config, const int64_t* counts, int64_t level) {
  __shared__ unsigned long long sum;
  __syncthreads();
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  unsigned long long mine = 0;
  for (int32_t e = threadIdx.x; e < config.num_local_experts(); e += blockDim.x) {
    mine += RowsAtLevel(counts + e, 1, level, config.expert_alignment);
  }
  atomicAdd(&sum, mine);
  __syncthreads();
  return static_cast<int64_t>(sum);
}

// CutLevel of cc/routing.h, by a block.
__device__ int64_t BlockCutLevel(const Config& config, const int64_t* counts, int64_t highest) {
  if (BlockRowsAtLevel(config, counts, highest) <= config.recv_capacity) return highest;
  int64_t low = 0;
  int64_t high = highest;
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (BlockRowsAtLevel(config, counts, middle) <= config.recv_capacity) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Sum of a value over the lanes before this one, and over all of them.
struct WarpPrefix {
  int64_t before;
  int64_t total;
};
__device__ WarpPrefix PrefixOf(int64_t value) {
  const int lane = threadIdx.x % kWarpSize;
  int64_t sum = value;
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int64_t other = __shfl_up_sync(kFullWarp, sum, offset);
    if (lane >= offset) sum += other;
  }
  return {sum - value, __shfl_sync(kFullWarp, sum, kWarpSize - 1)};
}

// First rows and ends of the groups, from their counts, which become the first rows. One warp.
__device__ void PlaceGroups(const RankView& view, const ExpertsOut& out, int64_t* counts,
                            int64_t level) {
  const int32_t num_local = view.config.num_local_experts();
  int64_t next = 0;
  int64_t dropped = 0;
  for (int32_t first = 0; first < num_local; first += kWarpSize) {
    const int32_t e = first + static_cast<int32_t>(threadIdx.x);
    const int64_t count = e < num_local ? counts[e] : 0;
    const int64_t kept = count < level ? count : level;
    const int64_t size = RoundUp(kept, view.config.expert_alignment);
    const WarpPrefix prefix = PrefixOf(size);
    dropped += PrefixOf(count - kept).total;
    if (e < num_local) {
      counts[e] = next + prefix.before;
      view.group_end[e] = counts[e] + kept;
      view.group_next[e] = counts[e] + size;
    }
    next += prefix.total;
  }
  if (threadIdx.x == 0) *out.dropped = static_cast<int32_t>(dropped);
}

// Places the groups: GroupPlan of cc/routing.h. One block.
__global__ void PlanKernel(const RankView view, const ExpertsOut out) {
  extern __shared__ int64_t counts[];  // [num_local_experts]
  __shared__ unsigned long long highest;
  const Config& config = view.config;
  const Current current = view.state->current;
  const int32_t num_local = config.num_local_experts();
  if (threadIdx.x == 0) highest = 0;
  __syncthreads();
  for (int32_t e = threadIdx.x; e < num_local; e += blockDim.x) {
    int64_t count = 0;
    for (int32_t source = 0; source < config.ep_size; ++source) {
      view.group_row[source * num_local + e] = count;
      if (current.failed != kOk) continue;
      count += RowsPerExpert(Notice(view, view.rank, current.slot, source))[e];
    }
    counts[e] = count;
    out.counts[e] = static_cast<int32_t>(count);
    atomicMax(&highest, static_cast<unsigned long long>(count));
  }
  __syncthreads();
  const int64_t level = BlockCutLevel(config, counts, static_cast<int64_t>(highest));
  __syncthreads();
  if (threadIdx.x < kWarpSize) PlaceGroups(view, out, counts, level);
  __syncthreads();
  for (int32_t e = threadIdx.x; e < num_local; e += blockDim.x) {
    out.group_sizes[e] = static_cast<int32_t>(view.group_next[e] - counts[e]);
    for (int32_t source = 0; source < config.ep_size; ++source) {
      view.group_row[source * num_local + e] += counts[e];
    }
  }
  for (int32_t source = threadIdx.x; source < config.ep_size; source += blockDim.x) {
    out.num_rows_from[source] = current.failed == kOk ? view.state->num_rows[source] : 0;
  }
}

// The expert rows of a token row, one lane for each k; -1 for none or dropped. `writes`: also into
// the layout and the weights.
__device__ int32_t ExpertRow(const RankView& view, const TokenRow& from, const ExpertsOut& out,
                             bool writes) {
  const int32_t top_k = view.config.top_k;
  const int k = threadIdx.x % kWarpSize;
  if (k >= top_k) return -1;
  const int64_t entry = int64_t{from.row} * top_k + k;
  const int32_t expert = PartOf<int32_t>(from.message, from.layout.local_expert)[entry];
  int64_t row = -1;
  if (expert >= 0) {
    row = view.group_row[from.source * view.config.num_local_experts() + expert] +
          PartOf<int32_t>(from.message, from.layout.position)[entry];
    if (row >= view.group_end[expert]) row = -1;
  }
  if (writes) {
    const int64_t token_row = view.state->first_row[from.source] + from.row;
    out.layout_rows[token_row * top_k + k] = static_cast<int32_t>(row);
    if (row >= 0) out.weights[row] = PartOf<float>(from.message, from.layout.weight)[entry];
  }
  return static_cast<int32_t>(row);
}

// One segment of a token row, read once and written to all of its expert rows.
__device__ void SpreadSegment(const TokenRow& from, const MutableRows& out, int32_t expert_row,
                              int32_t first, int32_t end) {
  const int lane = threadIdx.x % kWarpSize;
  const unsigned present = __ballot_sync(kFullWarp, expert_row >= 0);
  const auto* source = reinterpret_cast<const uint4*>(from.bytes()) + lane;
  for (; first < end; first += kUnroll * kWarpSize) {
    uint4 words[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int32_t i = first + u * kWarpSize;
      if (i + lane < end) words[u] = __ldcs(source + i);
    }
    for (unsigned left = present; left != 0; left &= left - 1) {
      const int64_t row = __shfl_sync(kFullWarp, expert_row, __ffs(static_cast<int>(left)) - 1);
      auto* to = reinterpret_cast<uint4*>(out.values + row * out.values_bytes) + lane;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int32_t i = first + u * kWarpSize;
        if (i + lane < end) __stcs(to + i, words[u]);
      }
    }
  }
}

// All of a token row whose parts are not whole words.
__device__ void SpreadParts(const TokenRow& from, const MutableRows& out, int32_t expert_row) {
  for (unsigned left = __ballot_sync(kFullWarp, expert_row >= 0); left != 0; left &= left - 1) {
    SplitRow(from, out, __shfl_sync(kFullWarp, expert_row, __ffs(static_cast<int>(left)) - 1));
  }
}

__device__ void UnpackPart(const RankView& view, const ExpertsOut& out, int32_t source, int part,
                           const Warps& warps) {
  const DeviceState* state = view.state;
  TokenRow from;
  from.source = source;
  from.message = InMessage(view, state->current.slot, source);
  from.layout = LayoutOf(view.config, HeaderOf(from.message));
  const bool wide = out.rows.scales_bytes == 0 && out.rows.values_bytes % 16 == 0;
  const Segments segments(wide ? out.rows.values_bytes : 1);
  const int32_t first_row = part == 0 ? 0 : state->first_part[source];
  const int32_t end_row = part == 0 ? state->first_part[source] : state->num_rows[source];
  const int64_t num_items = int64_t{end_row - first_row} * segments.per_row;
  for (int64_t item = warps.index; item < num_items; item += warps.count) {
    const auto row = static_cast<int32_t>(item / segments.per_row);
    const auto segment = static_cast<int32_t>(item - int64_t{row} * segments.per_row);
    from.row = first_row + row;
    const int32_t expert_row = ExpertRow(view, from, out, segment == 0);
    if (wide) {
      SpreadSegment(from, out.rows, expert_row, segments.begin(segment), segments.end(segment));
    } else {
      SpreadParts(from, out.rows, expert_row);
    }
  }
}

// Padding of the groups, rows past the last group, and layout rows that no token row has.
__device__ void ZeroTheRest(const RankView& view, const ExpertsOut& out, const Warps& warps) {
  const Config& config = view.config;
  const int lane = threadIdx.x % kWarpSize;
  const int32_t num_local = config.num_local_experts();
  const auto zero = [&](int64_t row) {
    FillRow(out.rows, row, 0);
    if (lane == 0) out.weights[row] = 0;
  };
  for (int64_t e = warps.index; e < num_local; e += warps.count) {
    for (int64_t row = view.group_end[e]; row < view.group_next[e]; ++row) zero(row);
  }
  const int64_t end = view.group_next[num_local - 1];
  for (int64_t row = end + warps.index; row < config.recv_capacity; row += warps.count) zero(row);
  const int64_t used = int64_t{view.state->first_row[config.ep_size]} * config.top_k;
  const int64_t all = config.max_recv_tokens() * config.top_k;
  for (int64_t i = used + warps.index * kWarpSize + lane; i < all; i += warps.count * kWarpSize) {
    out.layout_rows[i] = -1;
  }
}

__device__ void PoisonExperts(const RankView& view, const ExpertsOut& out, const Warps& warps) {
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t row = warps.index; row < view.config.recv_capacity; row += warps.count) {
    FillRow(out.rows, row, kPoison);
    if (lane == 0) out.weights[row] = __int_as_float(-1);
  }
  const int64_t all = view.config.max_recv_tokens() * view.config.top_k;
  for (int64_t i = warps.index * kWarpSize + lane; i < all; i += warps.count * kWarpSize) {
    out.layout_rows[i] = -1;
  }
}

// One part of one source's rows. With the first also all that no source writes; after the last the
// messages are acknowledged.
struct Turn {
  int32_t source;
  int part;
  bool first;
  bool last;
};
__global__ void __launch_bounds__(kRowThreads)
    UnpackExpertsKernel(const RankView view, const ExpertsOut out, const Turn turn) {
  const Warps warps = WarpsOfGrid();
  const Current current = view.state->current;
  if (current.failed == kOk) {
    UnpackPart(view, out, turn.source, turn.part, warps);
    if (turn.first) ZeroTheRest(view, out, warps);
  } else if (turn.last) {
    PoisonExperts(view, out, warps);
  }
  if (turn.last && current.failed != kNothing && IsLastBlock(view.state)) Acknowledge(view);
}

// ----------------------------------------------------------------------------------------- tokens

__device__ void UnpackTokenRow(const RankView& view, const TokensOut& out, int64_t i) {
  const int32_t top_k = view.config.top_k;
  const int k = threadIdx.x % kWarpSize;
  const TokenRow from = FindRow(view, i);
  const int64_t entry = int64_t{from.row} * top_k + k;
  if (k < top_k) {
    out.topk_idx[i * top_k + k] = PartOf<int32_t>(from.message, from.layout.local_expert)[entry];
    out.topk_weights[i * top_k + k] = PartOf<float>(from.message, from.layout.weight)[entry];
  }
  if (k == 0) out.layout_rows[i] = static_cast<int32_t>(i);
  SplitRow(from, out.rows, i);
}

__device__ void CountTokens(const RankView& view, const TokensOut& out) {
  const Config& config = view.config;
  const Current current = view.state->current;
  for (int32_t e = threadIdx.x; e < config.num_local_experts(); e += blockDim.x) {
    int32_t count = 0;
    for (int32_t source = 0; source < config.ep_size && current.failed == kOk; ++source) {
      count += RowsPerExpert(Notice(view, view.rank, current.slot, source))[e];
    }
    out.counts[e] = count;
  }
  for (int32_t source = threadIdx.x; source < config.ep_size; source += blockDim.x) {
    out.num_rows_from[source] = current.failed == kOk ? view.state->num_rows[source] : 0;
  }
  if (threadIdx.x == 0) {
    *out.num_tokens = current.failed == kOk ? view.state->first_row[config.ep_size] : 0;
  }
}

__global__ void __launch_bounds__(kRowThreads)
    UnpackTokensKernel(const RankView view, const TokensOut out) {
  const Warps warps = WarpsOfGrid();
  const Current current = view.state->current;
  const bool ok = current.failed == kOk;
  const int32_t top_k = view.config.top_k;
  const int k = threadIdx.x % kWarpSize;
  const int64_t num_rows = ok ? view.state->first_row[view.config.ep_size] : 0;
  for (int64_t i = warps.index; i < view.config.max_recv_tokens(); i += warps.count) {
    if (i < num_rows) {
      UnpackTokenRow(view, out, i);
      continue;
    }
    FillRow(out.rows, i, ok ? 0 : kPoison);
    if (k < top_k) {
      out.topk_idx[i * top_k + k] = -1;
      out.topk_weights[i * top_k + k] = ok ? 0.0F : __int_as_float(-1);
    }
    if (k == 0) out.layout_rows[i] = -1;
  }
  if (blockIdx.x == 0) CountTokens(view, out);
  if (current.failed != kNothing && IsLastBlock(view.state)) Acknowledge(view);
}

}  // namespace

void LaunchUnpackExperts(const RankView& view, const ExpertsOut& out, cudaStream_t stream) {
  const auto shared = view.config.num_local_experts() * sizeof(int64_t);
  PlanKernel<<<1, kPlanThreads, shared, stream>>>(view, out);
  static const int blocks = RowBlocks(UnpackExpertsKernel, INT32_MAX);
  const int32_t ep_size = view.config.ep_size;
  for (int part = 0; part < kNumParts; ++part) {
    for (int32_t i = 0; i < ep_size; ++i) {
      // Rank r sends to r + 1 first, so that the messages come in from r - 1 backwards.
      const int32_t source = (view.rank - i + ep_size) % ep_size;
      const bool first = part == 0 && i == 0;
      const bool last = part == kLastPart && i == ep_size - 1;
      LaunchWaitMessages(view, {Op::kDispatchRecv, part, source, 1}, stream);
      UnpackExpertsKernel<<<blocks, kRowThreads, 0, stream>>>(view, out,
                                                              Turn{source, part, first, last});
    }
  }
}

void LaunchUnpackTokens(const RankView& view, const TokensOut& out, cudaStream_t stream) {
  LaunchWaitMessages(view, {Op::kDispatchRecv, kLastPart, 0, view.config.ep_size}, stream);
  static const int blocks = RowBlocks(UnpackTokensKernel, INT32_MAX);
  UnpackTokensKernel<<<blocks, kRowThreads, 0, stream>>>(view, out);
}

cudaError_t LoadUnpack() {
  if (const cudaError_t error = Load(PlanKernel); error != cudaSuccess) return error;
  if (const cudaError_t error = Load(UnpackExpertsKernel); error != cudaSuccess) return error;
  return Load(UnpackTokensKernel);
}

}  // namespace jax_sm_free::cuda
