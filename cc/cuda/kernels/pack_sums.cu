// Sums of expert rows into messages to the ranks of the tokens: reduce and pack.

#include <cuda_runtime.h>

#include "cc/cuda/kernels/begin.cuh"
#include "cc/cuda/kernels/bulk_sum.cuh"
#include "cc/cuda/kernels/expert_terms.cuh"
#include "cc/cuda/kernels/kernels.h"
#include "cc/cuda/kernels/launch.h"
#include "cc/cuda/kernels/post.cuh"
#include "cc/cuda/kernels/sums.cuh"

namespace jax_sm_free::cuda {
namespace {

// Begins the exchange: writes headers and the number of rows for each destination. One block, with
// one thread for each rank.
__global__ void BeginPackSumsKernel(const RankView view, const PackSumsArgs args) {
  DeviceState* state = view.state;
  Begin(view, args.op, args.begin);
  AdmitNext();
  if (state->current.failed == kNothing) return;
  for (int32_t dst = threadIdx.x; dst < view.config.ep_size; dst += blockDim.x) {
    const int32_t num_rows = args.rows.layout.num_rows_from[dst];
    if (num_rows < 0 || num_rows > view.config.max_tokens) {
      Raise(view, args.op, {FaultCode::kLayoutCount, dst, 0, num_rows});
      state->current.failed = kEmpty;
    }
    state->num_rows[dst] = num_rows;
  }
  __syncthreads();
  const Current current = state->current;
  for (int32_t dst = threadIdx.x; dst < view.config.ep_size; dst += blockDim.x) {
    const bool failed = current.failed != kOk;
    MessageHeader header;
    header.kind = failed ? kPoisonedKind : static_cast<int32_t>(KindOf(args.op));
    header.num_rows = failed ? 0 : state->num_rows[dst];
    header.row_bytes = args.matrix.row_bytes();
    // The first message of the ring goes in parts, so that its transfer can start before it is
    // complete. A message with gradients of weights does not, because these lie before all rows.
    const bool is_first = dst == view.messages.sums_sent[0] && dst != view.rank;
    if (is_first && args.weight_grads == nullptr) {
      header.first_part = FirstPartRows(header.num_rows, header.row_bytes);
    }
    WriteHeader(view, dst, header);
  }
  if (threadIdx.x != 0) return;
  int32_t next = 0;
  for (int32_t dst = 0; dst < view.config.ep_size; ++dst) {
    state->first_row[dst] = next;
    next += current.failed == kOk ? state->num_rows[dst] : 0;
  }
  state->first_row[view.config.ep_size] = next;
}

// The order in which token rows are summed: first those for the next rank of the ring, last those
// for this rank. Those for this rank may be left to the recv.
struct RingOrder {
  int64_t first;
  int64_t end;
  int64_t count;

  __device__ RingOrder(const RankView& view, bool leaves_own)
      : first(view.state->first_row[(view.rank + 1) % view.config.ep_size]),
        end(view.state->first_row[view.config.ep_size]),
        count(leaves_own ? end - view.state->num_rows[view.rank] : end) {}
  __device__ int64_t row(int64_t i) const { return first + i < end ? first + i : first + i - end; }
};

// The same in two tiers, in the order of MessageTable::sums_sent: the sums that are forwarded come
// first. Each object is asked for rising numbers of rows: of those whose terms are looked up, which
// may be ahead of those that are summed.
class TierOrder {
 public:
  const int64_t count;

  __device__ TierOrder(const RankView& view, bool /*leaves_own*/)
      : count(view.state->first_row[view.config.ep_size]), view_(view) {}
  __device__ int64_t row(int64_t i) const {
    while (i >= end_) {
      const int32_t message = view_.messages.sums_sent[next_++];
      offset_ = view_.state->first_row[message] - end_;
      end_ += view_.state->num_rows[message];
    }
    return i + offset_;
  }

 private:
  const RankView& view_;
  mutable int32_t next_ = 0;
  mutable int64_t end_ = 0;     // of the rows of the messages so far
  mutable int64_t offset_ = 0;  // of the rows of the last one
};

// The step in which a part of the i-th message, counted from 1, is packed. Only the first message
// may have two parts.
__device__ int StepOf(int32_t i, int part) { return i - 1 + part; }

// Posts notices, and each message when it is complete. A warp of the watch calls this.
__device__ void PostMessages(const RankView& view, const Steps& steps) {
  const int32_t ep_size = view.config.ep_size;
  const auto lane = static_cast<int32_t>(threadIdx.x % kWarpSize);
  if (lane < ep_size) SendNotice(view, lane);
  PostParts(view, lane == 0 ? view.rank : -1, kLastPart);  // later kernels read this
  for (int32_t i = 1; i < ep_size; ++i) {
    const int32_t dst = view.messages.sums_sent[i - 1];
    const MessageHeader& header = HeaderOf(OutMessage(view, view.state->current.slot, dst));
    for (int part = header.first_part > 0 ? 0 : kLastPart; part < kNumParts; ++part) {
      steps.Await(StepOf(i, part));
      PostParts(view, lane == 0 ? dst : -1, part);
    }
  }
}

// Packs the message for one rank after the other. The first message has two parts, so that its
// first part is sent while the second part is summed.
template <typename T, int kWidth, bool kWeighted, bool kBulk, typename Order>
__global__ void __launch_bounds__(kSumThreads<kBulk>, kSumBlocks<kBulk>)
    PackSumsKernel(const RankView view, const PackSumsArgs args) {
  AwaitPrevious();
  const DeviceState* state = view.state;
  const Current current = state->current;
  if (current.failed == kNothing) return;
  const Steps steps(view.state);
  if (IsWatch()) {
    if (threadIdx.x < kWarpSize) PostMessages(view, steps);
    return;
  }
  const int lane = threadIdx.x % kWarpSize;
  const int32_t ep_size = view.config.ep_size;
  const int32_t top_k = view.config.top_k;
  const Order order(view, args.leaves_own);
  const ExpertTerms experts(view, args.op, args.rows, args.matrix.row_bytes());
  const auto terms_of = [&](int64_t i) { return experts(order.row(i)); };
  SumOf<T, kWidth, kWeighted, kBulk, decltype(terms_of)> sum(args.matrix, order.count, Workers(),
                                                             view.state, terms_of);
  Claim at = sum.Next();
  int64_t before = 0;  // rows of the messages before this one
  for (int32_t i = 1; i <= ep_size; ++i) {
    const int32_t dst = view.messages.sums_sent[i - 1];
    std::byte* message = OutMessage(view, current.slot, dst);
    const MessageHeader& header = HeaderOf(message);
    const MessageLayout layout = LayoutOf(view.config, header);
    const int64_t first = state->first_row[dst];
    for (int part = header.first_part > 0 ? 0 : kLastPart; part < kNumParts; ++part) {
      const int64_t rows = part == kLastPart ? header.num_rows : header.first_part;
      const int64_t end = min(before + rows, order.count);
      for (; current.failed == kOk && at.row < end; at = sum.Next()) {
        const int64_t row = at.row - before;
        sum.Sum(at, message + layout.rows + row * layout.row_stride);
        if (args.weight_grads != nullptr && lane < top_k && at.segment == 0) {
          PartOf<float>(message, layout.weight)[row * top_k + lane] =
              args.weight_grads[(first + row) * top_k + lane];
        }
      }
      if (dst != view.rank) steps.End(StepOf(i, part));
    }
    before += header.num_rows;
  }
}

struct Launch {
  const RankView& view;
  const PackSumsArgs& args;
  cudaStream_t stream;

  template <typename T, int kWidth, bool kWeighted, bool kBulk, typename Order>
  void Run() const {
    constexpr int kThreads = kSumThreads<kBulk>;
    const auto kernel = PackSumsKernel<T, kWidth, kWeighted, kBulk, Order>;
    static const int most = FullGrid(kernel, kThreads);
    const Segments segments(args.matrix.row_bytes(), kSumWords<kBulk>);
    const int64_t warps = view.config.max_recv_tokens() * segments.per_row;
    EnqueueBehind(kernel, {BlocksAndWatch(warps, most, kThreads), kThreads}, stream, view, args);
  }
  template <typename T, int kWidth, bool kWeighted, bool kBulk>
  void Run() const {
    view.config.has_two_tiers() ? Run<T, kWidth, kWeighted, kBulk, TierOrder>()
                                : Run<T, kWidth, kWeighted, kBulk, RingOrder>();
  }
  template <typename T, int kWidth, bool kWeighted>
  void Run() const {
    if constexpr (kWidth > 1) {
      if (GoesInBulk(args.matrix)) return Run<T, kWidth, kWeighted, true>();
    }
    Run<T, kWidth, kWeighted, false>();
  }
  template <typename T, int kWidth>
  void operator()() const {
    args.rows.weights != nullptr ? Run<T, kWidth, true>() : Run<T, kWidth, false>();
  }
};

struct LoadAll {
  cudaError_t* error;
  template <typename T, int kWidth>
  void operator()() const {
    LoadOne<T, kWidth, true, false>();
    LoadOne<T, kWidth, false, false>();
    if constexpr (kWidth > 1) LoadOne<T, kWidth, true, true>();
    if constexpr (kWidth > 1) LoadOne<T, kWidth, false, true>();
  }
  template <typename T, int kWidth, bool kWeighted, bool kBulk>
  void LoadOne() const {
    LoadOne<T, kWidth, kWeighted, kBulk, RingOrder>();
    LoadOne<T, kWidth, kWeighted, kBulk, TierOrder>();
  }
  template <typename T, int kWidth, bool kWeighted, bool kBulk, typename Order>
  void LoadOne() const {
    if (*error == cudaSuccess) *error = Load(PackSumsKernel<T, kWidth, kWeighted, kBulk, Order>);
  }
};

}  // namespace

void LaunchPackSums(const RankView& view, const PackSumsArgs& args, cudaStream_t stream) {
  Enqueue(BeginPackSumsKernel, {1, kMaxRanks}, stream, view, args);
  VisitElement(args.matrix, Launch{view, args, stream});
}

cudaError_t LoadPackSums() {
  cudaError_t error = Load(BeginPackSumsKernel);
  ForEachElement(LoadAll{&error});
  return error;
}

}  // namespace jax_sm_free::cuda
