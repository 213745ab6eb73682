// Sums over the ranks of this node, for each rail peer: the messages that the node has for the peer
// become one rail message. The order of the sum is that of places.

#include <cuda_runtime.h>

#include "cc/cuda/kernels/bulk_sum.cuh"
#include "cc/cuda/kernels/forward.cuh"
#include "cc/cuda/kernels/kernels.h"
#include "cc/cuda/kernels/launch.h"
#include "cc/cuda/kernels/post.cuh"
#include "cc/cuda/kernels/sums.cuh"
#include "cc/cuda/rank_view.h"

namespace jax_sm_free::cuda {
namespace {

// The messages that are summed. The object is in shared memory. All threads of a block call `Find`.
struct NodeMessages {
  // What a rank of this node has for another node.
  struct In {
    const std::byte* rows;
    const float* weight;  // [num_rows, top_k]
  };
  In in[kMaxRanks];  // by other node and place
  int64_t row_stride;
  int32_t first_row[kMaxRanks + 1];  // rows of the rail messages before, by other node

  __device__ void Find(const RankView& view, Op op) {
    const int32_t slot = view.state->current.slot;
    const int32_t node_size = view.config.node_size();
    const int32_t num_others = view.config.num_nodes - 1;
    for (int32_t i = threadIdx.x; i < num_others * node_size; i += blockDim.x) {
      std::byte* message = InMessage(view, slot, ForOtherNode(view, i / node_size, i % node_size));
      const MessageLayout layout = LayoutOf(view.config, HeaderOf(message));
      in[i] = {message + layout.rows, PartOf<float>(message, layout.weight)};
    }
    if (threadIdx.x == 0) {
      row_stride = LayoutOf(view.config, ForwardHeader(view, op, 0)).row_stride;
      first_row[0] = 0;
      for (int32_t other = 0; other < num_others; ++other) {
        first_row[other + 1] = first_row[other] + view.state->rail_rows[other];
      }
    }
    __syncthreads();
  }
};

// The terms of row i of all rail messages. The term of a lane is the row of the rank at this place.
class PlaceTerms {
 public:
  __device__ PlaceTerms(const RankView& view, const NodeMessages& messages)
      : view_(view),
        messages_(messages),
        node_size_(view.config.node_size()),
        own_node_(NodeOf(view.config, view.rank)) {}

  __device__ Terms operator()(int64_t i) const {
    int32_t other = 0;
    while (i >= messages_.first_row[other + 1]) ++other;
    const int place = threadIdx.x % kWarpSize;
    const int32_t row = place < node_size_ ? RowsOf(other, i)[place] : -1;
    Terms terms;
    terms.present = __ballot_sync(kFullWarp, row >= 0);
    if (row >= 0) {
      terms.row = messages_.in[other * node_size_ + place].rows + row * messages_.row_stride;
    }
    return terms;
  }

  // The rows of the sum in the messages of all places.
  __device__ const int32_t* RowsOf(int32_t other, int64_t i) const {
    return view_.row_of + RailRow(other, i) * node_size_;
  }
  // The place of row i in arrays of rows of rail messages.
  __device__ int64_t RailRow(int32_t other, int64_t i) const {
    return FirstRailRow(view_, OtherNode(own_node_, other)) + i - messages_.first_row[other];
  }

 private:
  const RankView& view_;
  const NodeMessages& messages_;
  int32_t node_size_;
  int32_t own_node_;
};

// The gradient of a weight is in the message of the rank that owns the expert.
__device__ void PassWeightGrads(const RankView& view, const ForwardSumsArgs& args,
                                const NodeMessages& messages, const PlaceTerms& terms_of,
                                int32_t other, int64_t i, float* out) {
  const int32_t top_k = view.config.top_k;
  const int k = threadIdx.x % kWarpSize;
  if (k >= top_k) return;
  const int32_t expert = args.node_topk[terms_of.RailRow(other, i) * top_k + k];
  float grad = 0;
  if (expert >= 0) {
    const int32_t place = OwnerRank(expert, view.config.num_local_experts());
    const int64_t row = terms_of.RowsOf(other, i)[place];
    grad = messages.in[other * view.config.node_size() + place].weight[row * top_k + k];
  }
  out[k] = grad;
}

// Writes the headers, sends the notices, and posts each rail message when it is complete. The watch
// calls this.
__device__ void PostRail(const RankView& view, Op op, const Steps& steps) {
  const int32_t num_others = view.config.num_nodes - 1;
  const auto lane = static_cast<int32_t>(threadIdx.x);
  if (lane >= kWarpSize) return;
  if (lane < num_others) {
    const int32_t message = view.config.ep_size + lane;
    WriteHeader(view, message, ForwardHeader(view, op, view.state->rail_rows[lane]));
    SendNotice(view, message);
  }
  __syncwarp();
  for (int32_t other = 0; other < num_others; ++other) {
    steps.Await(other);
    PostParts(view, lane == 0 ? view.config.ep_size + other : -1, kLastPart);
  }
}

// Rows of messages lie at multiples of 16 bytes, so that they are summed in whole words. What lies
// behind a row whose size is not such a multiple is summed, too, and nobody reads it.
template <typename T, bool kBulk>
__global__ void __launch_bounds__(kSumThreads<kBulk>, kSumBlocks<kBulk>)
    ForwardSumsKernel(const RankView view, const ForwardSumsArgs args) {
  constexpr int kWidth = kRowAlignment / sizeof(T);
  __shared__ NodeMessages messages;
  AwaitPrevious();
  const Current current = view.state->current;
  if (current.failed == kNothing) return;
  const Steps steps(view.state);
  if (IsWatch()) return PostRail(view, args.op, steps);
  const int32_t num_others = view.config.num_nodes - 1;
  if (current.failed == kOk) {
    messages.Find(view, args.op);
    const bool has_grads = args.op == Op::kDispatchBackwardForward;
    const PlaceTerms terms_of(view, messages);
    const Matrix matrix{view.config.dtype, messages.row_stride / int64_t{sizeof(T)}};
    SumOf<T, kWidth, false, kBulk, PlaceTerms> sum(matrix, messages.first_row[num_others],
                                                   Workers(), view.state, terms_of);
    Claim at = sum.Next();
    for (int32_t other = 0; other < num_others; ++other) {
      const MessageLayout layout =
          LayoutOf(view.config, ForwardHeader(view, args.op, view.state->rail_rows[other]));
      std::byte* message = OutMessage(view, current.slot, view.config.ep_size + other);
      for (; at.row < messages.first_row[other + 1]; at = sum.Next()) {
        const int64_t row = at.row - messages.first_row[other];
        sum.Sum(at, message + layout.rows + row * layout.row_stride);
        if (has_grads && at.segment == 0) {
          PassWeightGrads(view, args, messages, terms_of, other, at.row,
                          PartOf<float>(message, layout.weight) + row * view.config.top_k);
        }
      }
      steps.End(other);
    }
  } else {
    for (int32_t other = 0; other < num_others; ++other) steps.End(other);
  }
}

struct Launch {
  const RankView& view;
  const ForwardSumsArgs& args;
  cudaStream_t stream;

  template <typename T, bool kBulk>
  void Run() const {
    constexpr int kThreads = kSumThreads<kBulk>;
    const auto kernel = ForwardSumsKernel<T, kBulk>;
    static const int most = FullGrid(kernel, kThreads);
    const Segments segments(RoundUp(view.config.row_bytes, kRowAlignment), kSumWords<kBulk>);
    const int64_t rows = int64_t{view.config.num_nodes - 1} * view.config.max_tokens;
    EnqueueBehind(kernel, {BlocksAndWatch(rows * segments.per_row, most, kThreads), kThreads},
                  stream, view, args);
  }
  template <typename T, int kWidth>
  void operator()() const {
    // The rows of a call may be shorter than the longest ones, for which this chooses.
    const Matrix longest{view.config.dtype,
                         RoundUp(view.config.row_bytes, kRowAlignment) / int64_t{sizeof(T)}};
    GoesInBulk(longest) ? Run<T, true>() : Run<T, false>();
  }
};

struct LoadAll {
  cudaError_t* error;
  template <typename T, int kWidth>
  void operator()() const {
    if (*error == cudaSuccess) *error = Load(ForwardSumsKernel<T, false>);
    if (*error == cudaSuccess) *error = Load(ForwardSumsKernel<T, true>);
  }
};

// Calls fn<T, kWidth>() with the element type.
template <typename Fn>
void VisitWide(DType dtype, const Fn& fn) {
  VisitElement(Matrix{dtype, 16}, fn);
}

}  // namespace

void LaunchForwardSums(const RankView& view, const ForwardSumsArgs& args, cudaStream_t stream) {
  VisitWide(view.config.dtype, Launch{view, args, stream});
}

cudaError_t LoadForwardSums() {
  cudaError_t error = cudaSuccess;
  for (const DType dtype : kDTypes) VisitWide(dtype, LoadAll{&error});
  return error;
}

}  // namespace jax_sm_free::cuda
