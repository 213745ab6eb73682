// The gradient of reduce and pack: each token row's gradient to the expert rows that were summed.

#include <cuda_runtime.h>

#include "cc/cuda/kernels.h"
#include "cc/cuda/launch.h"
#include "cc/cuda/sums.cuh"

namespace jax_sm_free::cuda {
namespace {

__device__ float WarpTotal(float value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}

// y_grad = weight * grad; returns the dot product of grad and y, in all lanes.
template <typename T, int kWidth>
__device__ float ScaleAndDot(const std::byte* grad, const std::byte* y, float weight,
                             int64_t hidden, std::byte* y_grad) {
  using V = Vector<T, kWidth>;
  float dot = 0;
  for (int64_t i = threadIdx.x % kWarpSize; i < hidden / kWidth; i += kWarpSize) {
    const V g = reinterpret_cast<const V*>(grad)[i];
    const V value = reinterpret_cast<const V*>(y)[i];
    V scaled;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      const float gradient = ToFloat(g.elements[c]);
      dot += gradient * ToFloat(value.elements[c]);
      scaled.elements[c] = FromFloat<T>(__fmul_rn(weight, gradient));
    }
    reinterpret_cast<V*>(y_grad)[i] = scaled;
  }
  return WarpTotal(dot);
}

// Marks the expert rows that the layout names; the others have no gradient.
__global__ void MarkKernel(const RankView view, const SpreadArgs args) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  AdmitNext();
  if (view.state->current.failed != kOk) return;
  const int64_t used = int64_t{view.state->first_row[view.config.ep_size]} * args.layout.fanout;
  for (int64_t i = first; i < used; i += stride) {
    const int32_t row = args.layout.rows[i];
    if (row < -1 || row >= args.layout.num_rows) {
      Raise(view, args.op, {FaultCode::kLayout, -1, args.layout.num_rows, row});
    } else if (row >= 0) {
      view.covered[row] = 1;
    }
  }
}

template <typename T, int kWidth>
__device__ void SpreadTokenRow(const RankView& view, const SpreadArgs& args, int32_t source,
                               int64_t i) {
  const DeviceState* state = view.state;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row_bytes = args.matrix.row_bytes();
  const std::byte* message = InMessage(view, state->current.slot, source);
  const MessageLayout layout = LayoutOf(view.config, HeaderOf(message));
  const std::byte* grad =
      message + layout.rows + (i - state->first_row[source]) * layout.row_stride;
  const int32_t mine =
      lane < args.layout.fanout ? args.layout.rows[i * args.layout.fanout + lane] : -1;
  const bool valid = mine >= 0 && mine < args.layout.num_rows;
  for (unsigned left = __ballot_sync(kFullWarp, valid); left != 0; left &= left - 1) {
    const int64_t row = __shfl_sync(kFullWarp, mine, __ffs(static_cast<int>(left)) - 1);
    std::byte* y_grad = args.y_grad + row * row_bytes;
    if (args.weights == nullptr) {
      WarpCopy(y_grad, grad, row_bytes);
      continue;
    }
    const float dot = ScaleAndDot<T, kWidth>(grad, args.y + row * row_bytes, args.weights[row],
                                             args.matrix.hidden, y_grad);
    if (lane == 0) args.weight_grads[row] = dot;
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kRowThreads)
    SpreadKernel(const RankView view, const SpreadArgs args) {
  AwaitPrevious();
  const DeviceState* state = view.state;
  const Current current = state->current;
  const Warps warps = WarpsOfGrid();
  const bool ok = current.failed == kOk;
  if (ok) {
    int32_t source = 0;
    for (int64_t i = warps.index; i < state->first_row[view.config.ep_size]; i += warps.count) {
      while (i >= state->first_row[source + 1]) ++source;
      SpreadTokenRow<T, kWidth>(view, args, source, i);
    }
  }
  for (int64_t row = warps.index; row < args.layout.num_rows; row += warps.count) {
    if (ok && view.covered[row] != 0) continue;
    WarpFill(args.y_grad + row * args.matrix.row_bytes(), ok ? 0 : 0xFF, args.matrix.row_bytes());
    if (args.weights != nullptr && threadIdx.x % kWarpSize == 0) {
      args.weight_grads[row] = ok ? 0.0F : __int_as_float(-1);
    }
  }
  if (current.failed != kNothing && IsLastBlock(view.state)) Acknowledge(view);
}

struct Launch {
  const RankView& view;
  const SpreadArgs& args;
  cudaStream_t stream;
  template <typename T, int kWidth>
  void operator()() const {
    const auto kernel = SpreadKernel<T, kWidth>;
    static const int blocks = FullGrid(kernel);
    EnqueueBehind(kernel, {blocks, kRowThreads}, stream, view, args);
  }
};

struct LoadAll {
  cudaError_t* error;
  template <typename T, int kWidth>
  void operator()() const {
    if (*error == cudaSuccess) *error = Load(SpreadKernel<T, kWidth>);
  }
};

}  // namespace

void LaunchSpread(const RankView& view, const SpreadArgs& args, cudaStream_t stream) {
  (void)cudaMemsetAsync(view.covered, 0, args.layout.num_rows, stream);
  static const int blocks = FullGrid(MarkKernel);
  Enqueue(MarkKernel, {blocks, kRowThreads}, stream, view, args);  // behind a memset
  Dispatch(args.matrix, Launch{view, args, stream});
}

cudaError_t LoadSpread() {
  cudaError_t error = Load(MarkKernel);
  ForEachElement(LoadAll{&error});
  return error;
}

}  // namespace jax_sm_free::cuda
