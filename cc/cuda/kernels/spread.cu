// The gradient of reduce and pack: writes the gradient of each token row to the expert rows that
// were summed.

#include <cuda_runtime.h>

#include <bit>
#include <cstddef>
#include <cstdint>

#include "cc/cuda/kernels/kernels.h"
#include "cc/cuda/kernels/launch.h"
#include "cc/cuda/kernels/sums.cuh"

namespace jax_sm_free::cuda {
namespace {

__device__ float WarpTotal(float value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}

// The number of blocks that an SM should have room for. Loads in flight matter more than the number
// of warps.
constexpr int kSpreadBlocks = 2;

// Writes y_grad = weight * grad, and returns the dot product of grad and y in all lanes. Each lane
// starts several loads before it stores, because the compiler must assume that a store changes what
// is loaded next.
template <typename T, int kWidth>
__device__ float ScaleAndDot(const std::byte* grad, const std::byte* y, float weight,
                             int64_t hidden, std::byte* y_grad) {
  using V = Vector<T, kWidth>;
  using Bits = BitsOf<V>;
  constexpr int kUnroll = kCopyUnroll;
  const int64_t count = hidden / kWidth;
  float dot = 0;
  for (int64_t first = threadIdx.x % kWarpSize; first < count; first += kUnroll * kWarpSize) {
    Bits gradients[kUnroll];
    Bits values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = first + u * kWarpSize;
      if (i < count) {
        gradients[u] = reinterpret_cast<const Bits*>(grad)[i];
        values[u] = __ldcs(reinterpret_cast<const Bits*>(y) + i);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = first + u * kWarpSize;
      if (i >= count) continue;
      const V g = std::bit_cast<V>(gradients[u]);
      const V value = std::bit_cast<V>(values[u]);
      V scaled;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        const float gradient = ToFloat(g.elements[c]);
        dot += gradient * ToFloat(value.elements[c]);
        scaled.elements[c] = FromFloat<T>(__fmul_rn(weight, gradient));
      }
      __stcs(reinterpret_cast<Bits*>(y_grad) + i, std::bit_cast<Bits>(scaled));
    }
  }
  return WarpTotal(dot);
}

// Marks the expert rows that the layout names. Other rows have no gradient.
__global__ void MarkKernel(const RankView view, const SpreadArgs args) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  AdmitNext();
  if (view.state->current.failed != kOk) return;
  const int64_t used =
      int64_t{view.state->first_row[view.config.ep_size]} * args.rows.layout.fanout;
  for (int64_t i = first; i < used; i += stride) {
    const int32_t row = args.rows.layout.rows[i];
    if (row < -1 || row >= args.rows.layout.num_rows) {
      Raise(view, args.op, {FaultCode::kLayout, -1, args.rows.layout.num_rows, row});
    } else if (row >= 0) {
      view.covered[row] = 1;
    }
  }
}

// Writes the gradient of a token row to one of its expert rows. A warp calls this.
template <typename T, int kWidth>
__device__ void SpreadEntry(const SpreadArgs& args, const std::byte* grad, int64_t row) {
  const int64_t row_bytes = args.matrix.row_bytes();
  std::byte* y_grad = args.y_grad + row * row_bytes;
  if (args.rows.weights == nullptr) {
    WarpCopy(y_grad, grad, row_bytes);
    return;
  }
  const float dot = ScaleAndDot<T, kWidth>(grad, args.rows.y + row * row_bytes,
                                           args.rows.weights[row], args.matrix.hidden, y_grad);
  if (threadIdx.x % kWarpSize == 0) args.weight_grads[row] = dot;
}

// The gradients in one message.
struct MessageRows {
  const std::byte* first;
  int64_t row_stride;
};
__device__ MessageRows RowsOf(const RankView& view, int32_t source) {
  const std::byte* message = InMessage(view, view.state->current.slot, source);
  const MessageLayout layout = LayoutOf(view.config, HeaderOf(message));
  return {message + layout.rows, layout.row_stride};
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kRowThreads, kSpreadBlocks)
    SpreadKernel(const RankView view, const SpreadArgs args) {
  AwaitPrevious();
  const DeviceState* state = view.state;
  const Current current = state->current;
  const Warps warps = WarpsOfGrid();
  const bool ok = current.failed == kOk;
  if (ok) {
    // Neighbouring warps handle the expert rows of one token row, so that its gradient is read from
    // memory once.
    const uint32_t fanout = args.rows.layout.fanout;
    const uint32_t used = state->first_row[view.config.ep_size] * fanout;
    int32_t source = 0;
    MessageRows gradients = RowsOf(view, source);
    for (uint32_t entry = warps.index; entry < used; entry += warps.count) {
      const int32_t row = args.rows.layout.rows[entry];
      if (row < 0 || row >= args.rows.layout.num_rows) continue;
      const int32_t token_row = static_cast<int32_t>(entry / fanout);
      while (token_row >= state->first_row[source + 1]) gradients = RowsOf(view, ++source);
      const int32_t i = token_row - state->first_row[source];
      SpreadEntry<T, kWidth>(args, gradients.first + i * gradients.row_stride, row);
    }
  }
  for (int64_t row = warps.index; row < args.rows.layout.num_rows; row += warps.count) {
    if (ok && view.covered[row] != 0) continue;
    WarpFill(args.y_grad + row * args.matrix.row_bytes(), ok ? 0 : 0xFF, args.matrix.row_bytes());
    if (args.rows.weights != nullptr && threadIdx.x % kWarpSize == 0) {
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
  (void)cudaMemsetAsync(view.covered, 0, args.rows.layout.num_rows, stream);
  static const int blocks = FullGrid(MarkKernel);
  Enqueue(MarkKernel, {blocks, kRowThreads}, stream, view, args);  // behind a memset
  VisitElement(args.matrix, Launch{view, args, stream});
}

cudaError_t LoadSpread() {
  cudaError_t error = Load(MarkKernel);
  ForEachElement(LoadAll{&error});
  return error;
}

}  // namespace jax_sm_free::cuda
