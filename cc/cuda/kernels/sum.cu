// Sums over the ranks: the end of a combine, and of the gradient of a dispatch.

#include <cuda_runtime.h>

#include <type_traits>

#include "cc/cuda/kernels/bulk_sum.cuh"
#include "cc/cuda/kernels/expert_terms.cuh"
#include "cc/cuda/kernels/kernels.h"
#include "cc/cuda/kernels/launch.h"
#include "cc/cuda/kernels/sums.cuh"

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

// The gradient of a weight is in the message of the rank that owns the expert.
__device__ void TakeWeightGrads(const RankView& view, const SumArgs& args, int64_t token) {
  const int32_t top_k = view.config.top_k;
  const int k = threadIdx.x % kWarpSize;
  if (k >= top_k) return;
  const int32_t expert = args.topk.idx[token * top_k + k];
  float grad = 0;
  if (expert >= 0) {
    const int32_t rank = OwnerRank(expert, view.config.num_local_experts());
    std::byte* message = InMessage(view, view.state->current.slot, rank);
    const MessageLayout layout = LayoutOf(view.config, HeaderOf(message));
    const int64_t row = view.row_of[token * view.config.ep_size + rank];
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

template <typename T, int kWidth, bool kSumsOwn, bool kBulk>
__global__ void __launch_bounds__(kSumThreads<kBulk>, kSumBlocks<kBulk>)
    SumKernel(const RankView view, const SumArgs args) {
  AwaitPrevious();
  const Current current = view.state->current;
  const Warps warps = WarpsOfGrid();
  if (current.failed == kOk) {
    const auto terms_of = [&] {
      if constexpr (kSumsOwn) {
        return TokenRowsAndOwn(view, args);
      } else {
        return TokenRows(view);
      }
    }();
    SumOf<T, kWidth, false, kBulk, std::remove_const_t<decltype(terms_of)>> sum(
        args.matrix, args.topk.num_tokens, warps, view.state, terms_of);
    for (Claim at = sum.Next(); at.row < args.topk.num_tokens; at = sum.Next()) {
      sum.Sum(at, args.sums + at.row * args.matrix.row_bytes());
      if (args.weight_grads != nullptr && at.segment == 0) TakeWeightGrads(view, args, at.row);
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

  template <typename T, int kWidth, bool kSumsOwn, bool kBulk>
  void Run() const {
    constexpr int kThreads = kSumThreads<kBulk>;
    const auto kernel = SumKernel<T, kWidth, kSumsOwn, kBulk>;
    static const int most = FullGrid(kernel, kThreads);
    const Segments segments(args.matrix.row_bytes(), kSumWords<kBulk>);
    const int64_t warps = args.topk.num_tokens * segments.per_row;
    EnqueueBehind(kernel, {BlocksFor(warps, most, kThreads), kThreads}, stream, view, args);
  }
  template <typename T, int kWidth, bool kSumsOwn>
  void Run() const {
    if constexpr (kWidth > 1) {
      if (GoesInBulk(args.matrix)) return Run<T, kWidth, kSumsOwn, true>();
    }
    Run<T, kWidth, kSumsOwn, false>();
  }
  template <typename T, int kWidth>
  void operator()() const {
    args.own ? Run<T, kWidth, true>() : Run<T, kWidth, false>();
  }
};

struct LoadAll {
  cudaError_t* error;
  template <typename T, int kWidth>
  void operator()() const {
    LoadBoth<T, kWidth, true>();
    LoadBoth<T, kWidth, false>();
  }
  template <typename T, int kWidth, bool kSumsOwn>
  void LoadBoth() const {
    if (*error == cudaSuccess) *error = Load(SumKernel<T, kWidth, kSumsOwn, false>);
    if constexpr (kWidth > 1) {
      if (*error == cudaSuccess) *error = Load(SumKernel<T, kWidth, kSumsOwn, true>);
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
