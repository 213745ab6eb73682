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

// The other node of the i-th rail message. Each node starts with another one.
__device__ int32_t RailAt(const RankView& view, int32_t i) {
  return NextOther(view.config, NodeOf(view.config, view.rank), i);
}

// The header of the i-th rail message. Like the first message of a combine, the first one goes in
// parts, so that its transfer can start before it is complete.
__device__ MessageHeader RailHeader(const RankView& view, Op op, int32_t i) {
  MessageHeader header = ForwardHeader(view, op, view.state->rail_rows[RailAt(view, i)]);
  if (i == 0 && op == Op::kCombineForward) {
    header.first_part = FirstPartRows(header.num_rows, header.row_bytes);
  }
  return header;
}

// The step in which a part of the i-th rail message is summed. Only the first one may have two
// parts.
__device__ int StepOf(int32_t i, int part) { return i + part; }

// The messages that are summed. The object is in shared memory. All threads of a block call `Find`.
struct NodeMessages {
  // What a rank of this node has for another node.
  struct In {
    const std::byte* rows;
    const float* weight;  // [num_rows, top_k]
  };
  In in[kMaxRanks];  // by other node and place
  int64_t row_stride;
  int32_t first_row[kMaxRanks + 1];  // rows of the rail messages before, in order

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
      for (int32_t i = 0; i < num_others; ++i) {
        first_row[i + 1] = first_row[i] + view.state->rail_rows[RailAt(view, i)];
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

  // Each object is asked for rising rows, which may be ahead of those that are summed.
  __device__ Terms operator()(int64_t i) const {
    while (i >= messages_.first_row[rail_ + 1]) ++rail_;
    const int32_t other = RailAt(view_, rail_);
    const int64_t rail_row = RailRow(other, i - messages_.first_row[rail_]);
    const int place = threadIdx.x % kWarpSize;
    const int32_t row = place < node_size_ ? RowsOf(rail_row)[place] : -1;
    Terms terms;
    terms.present = __ballot_sync(kFullWarp, row >= 0);
    if (row >= 0) {
      terms.row = messages_.in[other * node_size_ + place].rows + row * messages_.row_stride;
    }
    return terms;
  }

  // The rows of a sum in the messages of all places.
  __device__ const int32_t* RowsOf(int64_t rail_row) const {
    return view_.row_of + rail_row * node_size_;
  }
  // The place of a row of a rail message in arrays of rows of all rail messages.
  __device__ int64_t RailRow(int32_t other, int64_t row) const {
    return FirstRailRow(view_, OtherNode(own_node_, other)) + row;
  }

 private:
  const RankView& view_;
  const NodeMessages& messages_;
  int32_t node_size_;
  int32_t own_node_;
  mutable int32_t rail_ = 0;  // of the last row, in order
};

// The gradient of a weight is in the message of the rank that owns the expert.
__device__ void PassWeightGrads(const RankView& view, const ForwardSumsArgs& args,
                                const NodeMessages& messages, const PlaceTerms& terms_of,
                                int32_t other, int64_t rail_row, float* out) {
  const int32_t top_k = view.config.top_k;
  const int k = threadIdx.x % kWarpSize;
  if (k >= top_k) return;
  const int32_t expert = args.node_topk[rail_row * top_k + k];
  float grad = 0;
  if (expert >= 0) {
    const int32_t place = OwnerRank(expert, view.config.num_local_experts());
    const int64_t row = terms_of.RowsOf(rail_row)[place];
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
    const int32_t message = view.config.ep_size + RailAt(view, lane);
    WriteHeader(view, message, RailHeader(view, op, lane));
    SendNotice(view, message);
  }
  __syncwarp();
  for (int32_t i = 0; i < num_others; ++i) {
    const int32_t message = view.config.ep_size + RailAt(view, i);
    const bool in_parts = RailHeader(view, op, i).first_part > 0;
    for (int part = in_parts ? 0 : kLastPart; part < kNumParts; ++part) {
      steps.Await(StepOf(i, part));
      PostParts(view, lane == 0 ? message : -1, part);
    }
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
  const bool ok = current.failed == kOk;
  if (ok) messages.Find(view, args.op);
  const bool has_grads = args.op == Op::kDispatchBackwardForward;
  const PlaceTerms terms_of(view, messages);
  const Matrix matrix{view.config.dtype, ok ? messages.row_stride / int64_t{sizeof(T)} : 0};
  SumOf<T, kWidth, false, kBulk, PlaceTerms> sum(matrix, ok ? messages.first_row[num_others] : 0,
                                                 Workers(), view.state, terms_of);
  Claim at = sum.Next();
  for (int32_t i = 0; i < num_others; ++i) {
    const int32_t other = RailAt(view, i);
    const MessageHeader header = RailHeader(view, args.op, i);
    const MessageLayout layout = LayoutOf(view.config, header);
    std::byte* message = OutMessage(view, current.slot, view.config.ep_size + other);
    for (int part = header.first_part > 0 ? 0 : kLastPart; part < kNumParts; ++part) {
      const int64_t end = part == kLastPart ? header.num_rows : header.first_part;
      for (; ok && at.row < messages.first_row[i] + end; at = sum.Next()) {
        const int64_t row = at.row - messages.first_row[i];
        sum.Sum(at, message + layout.rows + row * layout.row_stride);
        if (has_grads && at.segment == 0) {
          PassWeightGrads(view, args, messages, terms_of, other, terms_of.RailRow(other, row),
                          PartOf<float>(message, layout.weight) + row * view.config.top_k);
        }
      }
      steps.End(StepOf(i, part));
    }
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
