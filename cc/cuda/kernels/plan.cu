// Places the groups of a dispatch's expert rows, using the counts in the notices.

#include <cuda_runtime.h>

#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/kernels.h"
#include "cc/cuda/kernels/launch.h"

namespace jax_sm_free::cuda {
namespace {

constexpr int kPlanThreads = 256;

// Combines a value of each thread of the block; all threads get the result. It does not use
// atomics: on 64 bits of shared memory, they are loops.
template <typename Combine>
__device__ int64_t BlockReduce(int64_t value, const Combine& combine) {
  __shared__ int64_t of_warps[kPlanThreads / kWarpSize];
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  __syncthreads();  // all threads have read the earlier content
  if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = of_warps[0];
  for (int warp = 1; warp < kPlanThreads / kWarpSize; ++warp)
    value = combine(value, of_warps[warp]);
  return value;
}

// The rows of all groups if each group keeps its first `level` rows. All threads of the block get
// the sum.
__device__ int64_t BlockRowsAtLevel(const Config& config, const int64_t* counts, int64_t level) {
  int64_t mine = 0;
  for (int32_t e = threadIdx.x; e < config.num_local_experts(); e += blockDim.x) {
    mine += RowsAtLevel(counts + e, 1, level, config.expert_alignment);
  }
  return BlockReduce(mine, [](int64_t a, int64_t b) { return a + b; });
}

// CutLevel of cc/routing.h. A block computes it.
__device__ int64_t BlockCutLevel(const Config& config, const int64_t* counts, int64_t highest) {
  if (config.expert_capacity > 0) return config.expert_capacity;
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

// The sum of a value over the lanes before this one, and the sum over all lanes.
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

// Computes the first row and the end of each group from the counts, and replaces the counts by the
// first rows. One warp calls this.
__device__ void PlaceGroups(const RankView& view, const UnpackExpertsArgs& out, int64_t* counts,
                            int64_t level) {
  const int32_t num_local = view.config.num_local_experts();
  int64_t next = 0;
  int64_t dropped = 0;
  for (int32_t first = 0; first < num_local; first += kWarpSize) {
    const int32_t e = first + static_cast<int32_t>(threadIdx.x);
    const int64_t count = e < num_local ? counts[e] : 0;
    const int64_t kept = count < level ? count : level;
    const int64_t size = e < num_local ? GroupSize(view.config, kept) : 0;
    const WarpPrefix prefix = PrefixOf(size);
    dropped += PrefixOf(count - kept).total;
    if (e < num_local) {
      counts[e] = next + prefix.before;
      view.group_end[e] = counts[e] + kept;
      view.group_next[e] = counts[e] + size;
    }
    next += prefix.total;
  }
  if (threadIdx.x != 0) return;
  *out.dropped = static_cast<int32_t>(dropped);
  if (dropped > 0) {
    atomicAdd(&view.state->counters.rows_dropped, static_cast<Counters::Counter>(dropped));
  }
}

// Calls with(source, rows) for the rows that each source has for a local expert. There are none
// after a fault.
template <typename With>
__device__ void ForEachSource(const RankView& view, const Current& current, int32_t expert,
                              const With& with) {
  constexpr int kUnroll = 8;  // sources that are read in one round trip to memory
  const int32_t num_sources = current.failed == kOk ? view.config.ep_size : 0;
  for (int32_t first = 0; first < num_sources; first += kUnroll) {
    int32_t rows[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u >= num_sources) break;
      rows[u] = RowsPerExpert(Notice(view, view.rank, current.slot, first + u))[expert];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u < num_sources) with(first + u, rows[u]);
    }
  }
}

// Whether all messages have arrived. All threads of the block get the result.
__device__ bool AllHere(const RankView& view) {
  const Current current = view.state->current;
  if (current.failed != kOk) return false;
  bool here = true;
  for (int32_t source = threadIdx.x; source < view.config.ep_size; source += blockDim.x) {
    here = LoadAcquire(Signal(view, current.slot, source)) >= SignalOf(current.sequence, kLastPart);
  }
  return __syncthreads_and(here) != 0;
}

// Places the groups: GroupPlan of cc/routing.h. One block.
__global__ void PlanKernel(const RankView view, const UnpackExpertsArgs out) {
  auto* counts = DynamicShared<int64_t>();  // [num_local_experts]
  AwaitPrevious();
  AdmitNext();
  const Config& config = view.config;
  const Current current = view.state->current;
  const int32_t num_local = config.num_local_experts();
  int64_t highest = 0;
  for (int32_t e = threadIdx.x; e < num_local; e += blockDim.x) {
    int64_t count = 0;
    ForEachSource(view, current, e, [&](int32_t /*source*/, int32_t rows) { count += rows; });
    counts[e] = count;
    out.counts[e] = static_cast<int32_t>(count);
    highest = highest > count ? highest : count;
  }
  highest = BlockReduce(highest, [](int64_t a, int64_t b) { return a > b ? a : b; });
  const int64_t level = BlockCutLevel(config, counts, highest);
  __syncthreads();
  if (threadIdx.x < kWarpSize) PlaceGroups(view, out, counts, level);
  __syncthreads();
  for (int32_t e = threadIdx.x; e < num_local; e += blockDim.x) {
    out.group_sizes[e] = static_cast<int32_t>(view.group_next[e] - counts[e]);
    int64_t next = counts[e];
    ForEachSource(view, current, e, [&](int32_t source, int32_t rows) {
      view.group_row[source * num_local + e] = next;
      next += rows;
    });
  }
  for (int32_t source = threadIdx.x; source < config.ep_size; source += blockDim.x) {
    out.layout.num_rows_from[source] = current.failed == kOk ? view.state->num_rows[source] : 0;
  }
  const bool all_here = AllHere(view);
  if (threadIdx.x == 0) view.state->all_here = all_here ? 1 : 0;
}

}  // namespace

void LaunchPlan(const RankView& view, const UnpackExpertsArgs& out, cudaStream_t stream) {
  const auto shared = view.config.num_local_experts() * sizeof(int64_t);
  EnqueueBehind(PlanKernel, {1, kPlanThreads, shared}, stream, view, out);
}

cudaError_t LoadPlan() { return Load(PlanKernel); }

}  // namespace jax_sm_free::cuda
