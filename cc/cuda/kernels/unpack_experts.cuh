// The expert rows of a dispatch, turn by turn: rows that have arrived are written while others are
// in flight.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_UNPACK_EXPERTS_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_UNPACK_EXPERTS_CUH_

#include <array>
#include <cstddef>
#include <cstdint>

#include "cc/cuda/kernels/await.cuh"
#include "cc/cuda/kernels/claims.cuh"
#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/kernels.h"
#include "cc/cuda/kernels/launch.h"
#include "cc/cuda/kernels/unpack.cuh"

namespace jax_sm_free::cuda {

// Parts of the messages of some sources. One launch unpacks them.
struct Turn {
  // The first source, in the order of MessageTable::rows_received; and the number of sources.
  int32_t first = 0;
  int32_t count = 0;
  int first_part = 0;
  int last_part = kLastPart;
};

// Calls launch(turn, next) for all turns of a recv. A recv that has waited for all messages has one
// turn. Other recvs have up to four: the rows of this rank, which are there; the first part of all
// other messages; the second part of all other messages except the last one to arrive; and the
// rest. In two tiers, messages within the node have arrived by the time of the recv, and come
// before those that are forwarded.
template <typename Launch>
void ForEachTurn(const Config& config, bool all_here, const Launch& launch) {
  const int32_t ep_size = config.ep_size;
  if (all_here) return launch(Turn{0, ep_size, 0, kLastPart}, Turn{});
  const int32_t last = ep_size - 1;
  const int32_t in_last = last > 0 ? 1 : 0;
  const int32_t mates = config.node_size() - 1;
  const std::array<Turn, 4> flat = {{{0, 1, 0, kLastPart},
                                     {1, last, 0, 0},
                                     {1, last - 1, kLastPart, kLastPart},
                                     {last, in_last, kLastPart, kLastPart}}};
  const std::array<Turn, 4> tiers = {{{0, 1, 0, kLastPart},
                                      {1, mates, 0, kLastPart},
                                      {1 + mates, last - mates - 1, 0, kLastPart},
                                      {last, in_last, 0, kLastPart}}};
  const std::array<Turn, 4>& all = config.has_two_tiers() ? tiers : flat;
  Turn turn = all[0];
  for (size_t i = 1; i < all.size(); ++i) {
    if (all[i].count <= 0) continue;
    launch(turn, all[i]);
    turn = all[i];
  }
  launch(turn, Turn{});
}

// The token rows of a turn. The object is in shared memory. All threads of a block call `Find`.
class TurnRows {
 public:
  __device__ void Find(const RankView& view, const UnpackExpertsArgs& out, const Turn& turn) {
    const DeviceState* state = view.state;
    for (int32_t i = threadIdx.x; i < turn.count; i += blockDim.x) {
      const int32_t source = view.messages.rows_received[turn.first + i];
      const int32_t begin = turn.first_part == 0 ? 0 : state->first_part[source];
      const int32_t end =
          turn.last_part == kLastPart ? state->num_rows[source] : state->first_part[source];
      runs_[i].source = SourceOf(view, out.own_rows, out.rows.values_bytes, source);
      runs_[i].begin = begin;
      runs_[i].size = end - begin;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      count_ = turn.count;
      size_ = 0;
      for (int32_t i = 0; i < turn.count; ++i) {
        runs_[i].before = size_;
        size_ += runs_[i].size;
      }
    }
    __syncthreads();
  }

  __device__ int32_t size() const { return size_; }
  __device__ TokenRow at(int32_t i) const {
    int32_t run = count_ - 1;
    while (i < runs_[run].before) --run;
    return {runs_[run].source, runs_[run].begin + i - runs_[run].before};
  }

 private:
  struct Run {
    int32_t before;  // rows of the earlier runs
    int32_t size;
    int32_t begin;  // first row of the run in its message
    Source source;
  };
  Run runs_[kMaxRanks];
  int32_t count_;
  int32_t size_;
};

// The expert rows of a token row, one in each of the lanes k < top_k. -1 for none, or for a dropped
// row. If `writes` is set, also writes the layout and the weights.
__device__ inline int32_t ExpertRow(const RankView& view, const TokenRow& from,
                                    const UnpackExpertsArgs& out, bool writes) {
  const int32_t top_k = view.config.top_k;
  const int k = threadIdx.x % kWarpSize;
  if (k >= top_k) return -1;
  const int64_t entry = int64_t{from.place} * top_k + k;
  const int32_t expert = from.source.local_expert[entry];
  int64_t row = -1;
  if (expert >= 0) {
    row = view.group_row[from.source.rank * view.config.num_local_experts() + expert] +
          from.source.position[entry];
    if (row >= view.group_end[expert]) row = -1;
  }
  if (writes) {
    const int64_t token_row = view.state->first_row[from.source.rank] + from.number();
    out.layout.rows[token_row * top_k + k] = static_cast<int32_t>(row);
    if (row >= 0) out.weights[row] = from.source.weight[entry];
  }
  return static_cast<int32_t>(row);
}

__device__ inline std::byte* ExpertOutRow(const UnpackExpertsArgs& out, int64_t expert_row) {
  return expert_row < 0 ? nullptr : out.rows.values + expert_row * out.rows.values_bytes;
}

// Zeroes the padding of groups and the rows behind the last group, and writes -1 into the layout
// rows that no token row has.
__device__ inline void ZeroTheRest(const RankView& view, const UnpackExpertsArgs& out,
                                   const Warps& warps) {
  const Config& config = view.config;
  const int lane = threadIdx.x % kWarpSize;
  const int32_t num_local = config.num_local_experts();
  const auto zero = [&](int64_t row) {
    FillRow(out.rows, row, 0);
    if (lane == 0) out.weights[row] = 0;
  };
  constexpr int64_t kWarpsOfGroup = 16;
  for (int64_t i = warps.index; i < num_local * kWarpsOfGroup; i += warps.count) {
    const int64_t e = i / kWarpsOfGroup;
    int64_t row = view.group_end[e] + i % kWarpsOfGroup;
    for (; row < view.group_next[e]; row += kWarpsOfGroup) zero(row);
  }
  const int64_t end = view.group_next[num_local - 1];
  for (int64_t row = end + warps.index; row < config.recv_capacity; row += warps.count) zero(row);
  const int64_t used = int64_t{view.state->first_row[config.ep_size]} * config.top_k;
  const int64_t all = config.max_recv_tokens() * config.top_k;
  for (int64_t i = used + warps.index * kWarpSize + lane; i < all; i += warps.count * kWarpSize) {
    out.layout.rows[i] = -1;
  }
}

__device__ inline void PoisonExperts(const RankView& view, const UnpackExpertsArgs& out,
                                     const Warps& warps) {
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t row = warps.index; row < view.config.recv_capacity; row += warps.count) {
    FillRow(out.rows, row, kPoison);
    if (lane == 0) out.weights[row] = __int_as_float(-1);
  }
  const int64_t all = view.config.max_recv_tokens() * view.config.top_k;
  for (int64_t i = warps.index * kWarpSize + lane; i < all; i += warps.count * kWarpSize) {
    out.layout.rows[i] = -1;
  }
}

// Takes one turn: all threads of the grid call write(rows). The first turn also writes everything
// that does not come from a source. The last block of each turn waits for what the next turn needs;
// the last block of the last turn acknowledges. If all messages have arrived, the first turn takes
// the rows of all turns.
template <typename Write>
__device__ void TakeTurn(const RankView& view, const UnpackExpertsArgs& out, const Turn& planned,
                         const Turn& next, const Write& write) {
  __shared__ TurnRows rows;
  const bool first = planned.first == 0;
  if (first) AwaitPrevious();
  // The kernel before the first turn has written this.
  const bool at_once = view.state->all_here != 0;
  if (at_once && next.count > 0) AdmitNext();  // there is nothing for the next turn to do
  if (!first) AwaitPrevious();
  const Warps warps = WarpsOfGrid();
  const Current current = view.state->current;
  const bool last = at_once || next.count == 0;
  if (at_once && !first) return;
  const Turn turn = at_once ? Turn{0, view.config.ep_size, 0, kLastPart} : planned;
  if (current.failed == kOk) {
    rows.Find(view, out, turn);
    write(rows);
    if (first) ZeroTheRest(view, out, warps);
  } else if (last) {
    PoisonExperts(view, out, warps);
  }
  if (current.failed == kNothing || !IsLastBlock(view.state)) return;
  ResetClaims(view.state);
  if (last) {
    Acknowledge(view);
  } else if (current.failed == kOk) {
    AwaitMessages(view, Op::kDispatchRecv, Awaited::kSources, next.last_part, next.count,
                  [&](int32_t i) { return view.messages.rows_received[next.first + i]; });
  }
}

// LaunchUnpackExperts for rows that the wire quantised: unpack_dequantized.cu.
void LaunchUnpackExpertsDequantized(const RankView& view, const UnpackExpertsArgs& out,
                                    cudaStream_t stream);

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_UNPACK_EXPERTS_CUH_
