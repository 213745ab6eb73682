// Sums over the ranks, or over the nodes: the end of a combine, and of the gradient of a dispatch.

#include <cuda_runtime.h>

#include <type_traits>

#include "cc/cuda/kernels/bulk_sum.cuh"
#include "cc/cuda/kernels/expert_terms.cuh"
#include "cc/cuda/kernels/kernels.h"
#include "cc/cuda/kernels/launch.h"
#include "cc/cuda/kernels/sums.cuh"
#include "cc/cuda/kernels/tile.cuh"
#include "cc/cuda/rank_view.h"

namespace jax_sm_free::cuda {
namespace {

static_assert(kMaxRanks <= kWarpSize, "a lane for each rank");

// The rows of a token in the messages. Each lane handles one rank. The start of a message is looked
// up only once: to look it up for each segment of a row would be half of all instructions.
class TokenRows {
 public:
  __device__ explicit TokenRows(const RankView& view) : ep_size_(view.config.ep_size) {
    const int rank = threadIdx.x % kWarpSize;
    if (rank >= ep_size_) return;
    const std::byte* message = InMessage(view, view.state->current.slot, rank);
    const MessageLayout layout = LayoutOf(view.config, HeaderOf(message));
    row_of_ = view.row_of + rank;
    rows_ = message + layout.rows;
    row_stride_ = layout.row_stride;
  }

  __device__ Terms operator()(int64_t token) const {
    const int32_t row = row_of_ != nullptr ? row_of_[token * ep_size_] : -1;
    Terms terms;
    terms.present = __ballot_sync(kFullWarp, row >= 0);
    if (row >= 0) terms.row = rows_ + row * row_stride_;
    return terms;
  }

 private:
  int32_t ep_size_;
  const int32_t* row_of_ = nullptr;  // null in lanes without a rank
  const std::byte* rows_ = nullptr;
  int64_t row_stride_ = 0;
};

// The same for a message from this rank to itself that was left without rows. The sum that would be
// its row is computed here from the expert rows.
class TokenRowsAndOwn {
 public:
  __device__ TokenRowsAndOwn(const RankView& view, const SumArgs& args)
      : rank_(view.rank),
        messages_(view),
        own_row_of_(view.row_of + view.rank),
        ep_size_(view.config.ep_size),
        own_(view, args.op, *args.own, args.matrix.row_bytes()) {
    for (int32_t rank = 0; rank < rank_; ++rank) first_row_ += args.own->layout.num_rows_from[rank];
  }

  __device__ Terms operator()(int64_t token) const {
    Terms terms = messages_(token);
    terms.nested = terms.present & 1U << rank_;
    terms.present ^= terms.nested;
    return terms;
  }
  __device__ Terms Nested(int64_t token) const {
    const int32_t row = own_row_of_[token * ep_size_];
    return row < 0 ? Terms{} : own_(first_row_ + row);
  }

 private:
  int32_t rank_;
  TokenRows messages_;
  const int32_t* own_row_of_;
  int32_t ep_size_;
  ExpertTerms own_;
  int64_t first_row_ = 0;  // this rank's first row among the token rows of all ranks
};

// The same in two tiers. The terms are in the order of nodes: the rows of other nodes, and a sum
// over the ranks of this node.
class TierRows {
 public:
  __device__ explicit TierRows(const RankView& view)
      : num_lanes_(view.messages.num_lanes),
        num_nodes_(view.config.num_nodes),
        node_(NodeOf(view.config, view.rank)),
        row_of_(view.row_of) {
    const int lane = threadIdx.x % kWarpSize;
    const int32_t node_size = num_lanes_ - (num_nodes_ - 1);
    own_lanes_ = (1U << (node_size % kWarpSize)) - 1;
    if (lane >= num_lanes_) return;
    const std::byte* message =
        InMessage(view, view.state->current.slot, view.messages.of_lane[lane]);
    const MessageLayout layout = LayoutOf(view.config, HeaderOf(message));
    rows_ = message + layout.rows;
    row_stride_ = layout.row_stride;
    if (lane < num_nodes_ && lane != node_) from_lane_ = node_size + AmongOthers(node_, lane);
  }

  __device__ Terms operator()(int64_t token) const {
    const Terms of_lanes = OfLanes(token);
    const bool is_here = (of_lanes.present >> from_lane_ & 1U) != 0;
    const int lane = threadIdx.x % kWarpSize;
    Terms terms;
    terms.row = ShufflePointer(of_lanes.row, from_lane_);
    terms.present = __ballot_sync(kFullWarp, lane < num_nodes_ && lane != node_ && is_here);
    terms.nested = (of_lanes.present & own_lanes_) != 0 ? 1U << node_ : 0;
    return terms;
  }
  __device__ Terms Nested(int64_t token) const {
    Terms terms = OfLanes(token);
    terms.present &= own_lanes_;
    return terms;
  }

 private:
  // The row of the token in the message of each lane.
  __device__ Terms OfLanes(int64_t token) const {
    const int lane = threadIdx.x % kWarpSize;
    const int32_t row = lane < num_lanes_ ? row_of_[token * num_lanes_ + lane] : -1;
    Terms terms;
    terms.present = __ballot_sync(kFullWarp, row >= 0);
    if (row >= 0) terms.row = rows_ + row * row_stride_;
    return terms;
  }

  int32_t num_lanes_;
  int32_t num_nodes_;
  int32_t node_;
  const int32_t* row_of_;
  unsigned own_lanes_;  // of the ranks of this node
  int from_lane_ = 0;   // in the lane of another node: that of its message
  const std::byte* rows_ = nullptr;
  int64_t row_stride_ = 0;
};

// The terms of a sum.
enum class Summed { kMessages, kMessagesAndOwn, kTiers };

// The gradient of a weight is in the message of the rank that owns the expert, or of its node.
template <typename Router>
__device__ void TakeWeightGrads(const RankView& view, const SumArgs& args, int64_t token) {
  const int32_t top_k = view.config.top_k;
  const int k = threadIdx.x % kWarpSize;
  if (k >= top_k) return;
  const int32_t expert = args.topk.idx[token * top_k + k];
  float grad = 0;
  const Router router(view);
  // The route has raised a fault for an expert that does not exist.
  if (expert >= 0 && expert < router.num_experts()) {
    const int32_t lane = router.OfKey(router.KeyOf(expert)).lane;
    std::byte* message = InMessage(view, view.state->current.slot, view.messages.of_lane[lane]);
    const MessageLayout layout = LayoutOf(view.config, HeaderOf(message));
    const int64_t row = view.row_of[token * view.messages.num_lanes + lane];
    grad = PartOf<float>(message, layout.weight)[row * top_k + k];
  }
  args.weight_grads[token * top_k + k] = grad;
}

__device__ void PoisonRow(const RankView& view, const SumArgs& args, int64_t token) {
  const int lane = threadIdx.x % kWarpSize;
  const int32_t top_k = view.config.top_k;
  WarpFill(args.sums + token * args.matrix.row_bytes(), 0xFF, args.matrix.row_bytes());
  if (args.weight_grads != nullptr && lane < top_k) {
    args.weight_grads[token * top_k + lane] = __int_as_float(-1);
  }
}

template <typename T, int kWidth, Summed kSummed, bool kBulk>
__global__ void __launch_bounds__(kSumThreads<kBulk>, kSumBlocks<kBulk>)
    SumKernel(const RankView view, const SumArgs args) {
  AwaitPrevious();
  const Current current = view.state->current;
  const Warps warps = WarpsOfGrid();
  if (current.failed == kOk) {
    const auto terms_of = [&] {
      if constexpr (kSummed == Summed::kTiers) {
        return TierRows(view);
      } else if constexpr (kSummed == Summed::kMessagesAndOwn) {
        return TokenRowsAndOwn(view, args);
      } else {
        return TokenRows(view);
      }
    }();
    using Router = std::conditional_t<kSummed == Summed::kTiers, TierRouter, FlatRouter>;
    SumOf<T, kWidth, false, kBulk, std::remove_const_t<decltype(terms_of)>> sum(
        args.matrix, args.topk.num_tokens, warps, view.state, terms_of);
    for (Claim at = sum.Next(); at.row < args.topk.num_tokens; at = sum.Next()) {
      sum.Sum(at, args.sums + at.row * args.matrix.row_bytes());
      if (args.weight_grads != nullptr && at.segment == 0)
        TakeWeightGrads<Router>(view, args, at.row);
    }
  } else {
    for (int64_t token = warps.index; token < args.topk.num_tokens; token += warps.count) {
      PoisonRow(view, args, token);
    }
  }
  if (current.failed != kNothing && IsLastBlock(view.state)) Acknowledge(view);
}

struct Launch {
  const RankView& view;
  const SumArgs& args;
  cudaStream_t stream;

  template <typename T, int kWidth, Summed kSummed, bool kBulk>
  void Run() const {
    constexpr int kThreads = kSumThreads<kBulk>;
    const auto kernel = SumKernel<T, kWidth, kSummed, kBulk>;
    static const int most = FullGrid(kernel, kThreads);
    const Segments segments(args.matrix.row_bytes(), kSumWords<kBulk>);
    const int64_t warps = args.topk.num_tokens * segments.per_row;
    EnqueueBehind(kernel, {BlocksFor(warps, most, kThreads), kThreads}, stream, view, args);
  }
  template <typename T, int kWidth, Summed kSummed>
  void Run() const {
    if constexpr (kWidth > 1) {
      if (GoesInBulk(args.matrix)) return Run<T, kWidth, kSummed, true>();
    }
    Run<T, kWidth, kSummed, false>();
  }
  template <typename T, int kWidth>
  void operator()() const {
    if (view.config.has_two_tiers()) return Run<T, kWidth, Summed::kTiers>();
    args.own ? Run<T, kWidth, Summed::kMessagesAndOwn>() : Run<T, kWidth, Summed::kMessages>();
  }
};

struct LoadAll {
  cudaError_t* error;
  template <typename T, int kWidth>
  void operator()() const {
    LoadBoth<T, kWidth, Summed::kMessages>();
    LoadBoth<T, kWidth, Summed::kMessagesAndOwn>();
    LoadBoth<T, kWidth, Summed::kTiers>();
  }
  template <typename T, int kWidth, Summed kSummed>
  void LoadBoth() const {
    if (*error == cudaSuccess) *error = Load(SumKernel<T, kWidth, kSummed, false>);
    if constexpr (kWidth > 1) {
      if (*error == cudaSuccess) *error = Load(SumKernel<T, kWidth, kSummed, true>);
    }
  }
};

}  // namespace

void LaunchSum(const RankView& view, const SumArgs& args, cudaStream_t stream) {
  VisitElement(args.matrix, Launch{view, args, stream});
}

cudaError_t LoadSum() {
  cudaError_t error = cudaSuccess;
  ForEachElement(LoadAll{&error});
  return error;
}

}  // namespace jax_sm_free::cuda
