// The gradient of reduce and pack: each token row's gradient to the expert rows that were summed.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

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

// Vectors of a token row's gradient that a thread holds: it is read once, for all expert rows.
constexpr int kPerThread = 4;
// That an SM should have room for: loads of some are on their way while others multiply.
constexpr int kSpreadBlocks = 4;

// The gradient of one token row to its expert rows, by all threads of a block.
template <typename T, int kWidth>
class TokenRowGradient {
 public:
  using V = Vector<T, kWidth>;

  // Of vectors [begin, end) of the row `grad`; at most kPerThread for each thread.
  __device__ TokenRowGradient(const std::byte* grad, int64_t begin, int64_t end)
      : first_(begin + threadIdx.x), end_(end) {
    ForEach([&](int u, int64_t i) { grad_[u] = reinterpret_cast<const V*>(grad)[i]; });
  }

  __device__ void Copy(std::byte* y_grad) const {
    ForEach([&](int u, int64_t i) { reinterpret_cast<V*>(y_grad)[i] = grad_[u]; });
  }

  // y_grad = weight * grad; returns this warp's part of the dot product of grad and y.
  __device__ float ScaleAndDot(const std::byte* y, float weight, std::byte* y_grad) const {
    V values[kPerThread];
    ForEach([&](int u, int64_t i) { values[u] = reinterpret_cast<const V*>(y)[i]; });
    float dot = 0;
    ForEach([&](int u, int64_t i) {
      V scaled;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        const float gradient = ToFloat(grad_[u].elements[c]);
        dot += gradient * ToFloat(values[u].elements[c]);
        scaled.elements[c] = FromFloat<T>(__fmul_rn(weight, gradient));
      }
      reinterpret_cast<V*>(y_grad)[i] = scaled;
    });
    return WarpTotal(dot);
  }

 private:
  template <typename Fn>
  __device__ void ForEach(const Fn& fn) const {
#pragma unroll
    for (int u = 0; u < kPerThread; ++u) {
      const int64_t i = first_ + u * int64_t{blockDim.x};
      if (i < end_) fn(u, i);
    }
  }

  const int64_t first_;
  const int64_t end_;
  V grad_[kPerThread];
};

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

// By a block.
template <typename T, int kWidth>
__device__ void SpreadTokenRow(const RankView& view, const SpreadArgs& args, int32_t source,
                               int64_t i) {
  __shared__ float dots[kRowThreads / kWarpSize][kWarpSize];  // by warp and expert row
  const DeviceState* state = view.state;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t row_bytes = args.matrix.row_bytes();
  const std::byte* message = InMessage(view, state->current.slot, source);
  const MessageLayout layout = LayoutOf(view.config, HeaderOf(message));
  const std::byte* grad =
      message + layout.rows + (i - state->first_row[source]) * layout.row_stride;
  const int32_t mine =
      lane < args.layout.fanout ? args.layout.rows[i * args.layout.fanout + lane] : -1;
  const bool valid = mine >= 0 && mine < args.layout.num_rows;
  const unsigned present = __ballot_sync(kFullWarp, valid);

  dots[warp][lane] = 0;
  __syncwarp();
  const int64_t end = args.matrix.hidden / kWidth;
  const int64_t step = kPerThread * int64_t{blockDim.x};
  for (int64_t begin = 0; begin < end; begin += step) {
    const TokenRowGradient<T, kWidth> gradient(grad, begin, min(begin + step, end));
    for (unsigned left = present; left != 0; left &= left - 1) {
      const int k = __ffs(static_cast<int>(left)) - 1;
      const int64_t row = __shfl_sync(kFullWarp, mine, k);
      std::byte* y_grad = args.y_grad + row * row_bytes;
      if (args.weights == nullptr) {
        gradient.Copy(y_grad);
        continue;
      }
      const float dot = gradient.ScaleAndDot(args.y + row * row_bytes, args.weights[row], y_grad);
      if (lane == 0) dots[warp][k] += dot;
    }
  }
  if (args.weights == nullptr) return;
  __syncthreads();
  if (warp == 0 && valid) {
    float total = 0;
    for (int w = 0; w < blockDim.x / kWarpSize; ++w) total += dots[w][lane];
    args.weight_grads[mine] = total;
  }
  __syncthreads();  // before the next row's
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
    int32_t source = 0;
    for (int64_t i = blockIdx.x; i < state->first_row[view.config.ep_size]; i += gridDim.x) {
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

// Threads for a row of `num_vectors`: whole warps, all of which have something to do.
int RowThreads(int64_t num_vectors) {
  constexpr int64_t kPerWarp = kPerThread * kWarpSize;
  const int64_t num_warps = (num_vectors + kPerWarp - 1) / kPerWarp;
  return static_cast<int>(std::clamp<int64_t>(num_warps * kWarpSize, kWarpSize, kRowThreads));
}

struct Launch {
  const RankView& view;
  const SpreadArgs& args;
  cudaStream_t stream;
  template <typename T, int kWidth>
  void operator()() const {
    const auto kernel = SpreadKernel<T, kWidth>;
    static const int full = FullGrid(kernel);
    const int threads = RowThreads(args.matrix.hidden / kWidth);
    EnqueueBehind(kernel, {full * kRowThreads / threads, threads}, stream, view, args);
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
