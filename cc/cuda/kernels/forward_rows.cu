// The rows of rail messages into the messages to the ranks of this node. Each row is read once,
// however many ranks it goes to. Rows of messages lie at multiples of 16 bytes, so that they are
// copied in whole words, whatever they hold.

#include <cuda_runtime.h>

#include "cc/cuda/kernels/claims.cuh"
#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/forward.cuh"
#include "cc/cuda/kernels/kernels.h"
#include "cc/cuda/kernels/launch.h"
#include "cc/cuda/kernels/post.cuh"
#include "cc/cuda/rank_view.h"

namespace jax_sm_free::cuda {
namespace {

// Writes the headers and sends the notices of all messages, with the number of rows for each
// expert. One block calls this.
__device__ void AnnounceAll(const RankView& view, Op op) {
  const Current current = view.state->current;
  const int32_t node_size = view.config.node_size();
  const int32_t num_messages = (view.config.num_nodes - 1) * node_size;
  for (int32_t i = threadIdx.x; i < num_messages; i += blockDim.x) {
    WriteHeader(view, ForOtherNode(view, i / node_size, i % node_size),
                SpreadHeader(view, op, i / node_size, i % node_size));
  }
  const int32_t num_local = view.config.num_local_experts();
  const int32_t num_counted = op == Op::kDispatchForward ? num_messages * num_local : 0;
  for (int32_t i = threadIdx.x; i < num_counted; i += blockDim.x) {
    const int32_t other = i / (node_size * num_local);
    const int32_t expert = i % (node_size * num_local);
    const std::byte* rail = Notice(view, view.rank, current.slot, view.config.ep_size + other);
    const OtherEnd& end = EndOf(view, ForOtherNode(view, other, expert / num_local));
    RowsPerExpert(Notice(view, end.rank, current.slot, end.message))[expert % num_local] =
        current.failed == kOk ? RowsPerExpert(const_cast<std::byte*>(rail))[expert] : 0;
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < num_messages; i += blockDim.x) {
    SendNotice(view, ForOtherNode(view, i / node_size, i % node_size));
  }
  __syncthreads();
}

// Posts the messages of one source after the other. A warp of the watch calls this.
__device__ void PostAll(const RankView& view, const Steps& steps) {
  const auto lane = static_cast<int32_t>(threadIdx.x % kWarpSize);
  const int32_t node_size = view.config.node_size();
  // Each rank starts with another destination.
  const int32_t place = (PlaceInNode(view.config, view.rank) + 1 + lane) % node_size;
  for (int32_t other = 0; other < view.config.num_nodes - 1; ++other) {
    steps.Await(other);
    PostParts(view, lane < node_size ? ForOtherNode(view, other, place) : -1, kLastPart);
  }
}

struct Rows {
  std::byte* first;
  int64_t stride;
};

__global__ void __launch_bounds__(kRowThreads) ForwardRowsKernel(const RankView view, const Op op) {
  __shared__ Rows rails[kMaxRanks];
  __shared__ Rows outs[kMaxRanks];
  AwaitPrevious();
  const Current current = view.state->current;
  if (current.failed == kNothing) return;
  const Steps steps(view.state);
  if (IsWatch()) {
    AnnounceAll(view, op);
    if (threadIdx.x < kWarpSize) PostAll(view, steps);
    return;
  }
  const bool ok = current.failed == kOk;
  const int32_t num_others = view.config.num_nodes - 1;
  const int32_t node_size = view.config.node_size();
  for (int32_t i = threadIdx.x; ok && i < num_others; i += blockDim.x) {
    std::byte* message = InMessage(view, current.slot, view.config.ep_size + i);
    const MessageLayout layout = LayoutOf(view.config, HeaderOf(message));
    rails[i] = {message + layout.rows, layout.row_stride};
  }
  for (int32_t i = threadIdx.x; ok && i < num_others * node_size; i += blockDim.x) {
    const int32_t number = ForOtherNode(view, i / node_size, i % node_size);
    const MessageLayout layout =
        LayoutOf(view.config, SpreadHeader(view, op, i / node_size, i % node_size));
    outs[i] = {OutMessage(view, current.slot, number) + layout.rows, layout.row_stride};
  }
  __syncthreads();
  const int32_t own_node = NodeOf(view.config, view.rank);
  const int lane = threadIdx.x % kWarpSize;
  const Segments segments(ok && num_others > 0 ? rails[0].stride : 0, kCopyWords);
  Claims claims(view.state, segments, ok ? view.state->first_row[num_others] : 0, Workers());
  Claim at = claims.Next();
  for (int32_t other = 0; other < num_others; ++other) {
    const int32_t first = view.state->first_row[other];
    const int32_t end = view.state->first_row[other + 1];
    const int64_t first_rail_row = FirstRailRow(view, OtherNode(own_node, other));
    for (; ok && at.row < end; at = claims.Next()) {
      const int64_t row = at.row - first;
      const int32_t number =
          lane < node_size ? view.row_of[(first_rail_row + row) * node_size + lane] : -1;
      const Rows& out = outs[other * node_size + (number < 0 ? 0 : lane)];
      WarpCopyToAll(number < 0 ? nullptr : out.first + number * out.stride,
                    rails[other].first + row * rails[other].stride, segments.begin(at.segment),
                    segments.end(at.segment));
    }
    steps.End(other);
  }
}

}  // namespace

void LaunchForwardRows(const RankView& view, Op op, cudaStream_t stream) {
  static const int most = FullGrid(ForwardRowsKernel);
  const int64_t rows = int64_t{view.config.num_nodes - 1} * view.config.max_tokens;
  const Segments segments(RoundUp(view.config.row_bytes, kRowAlignment), kCopyWords);
  EnqueueBehind(ForwardRowsKernel, {BlocksAndWatch(rows * segments.per_row, most), kRowThreads},
                stream, view, op);
}

cudaError_t LoadForwardRows() { return Load(ForwardRowsKernel); }

}  // namespace jax_sm_free::cuda
