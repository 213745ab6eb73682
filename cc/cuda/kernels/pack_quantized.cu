// Token rows into messages, in a format that quantises them. Each row of x is read and quantised
// once, however many ranks it goes to.

#include <cuda_runtime.h>

#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/elements.cuh"
#include "cc/cuda/kernels/kernels.h"
#include "cc/cuda/kernels/launch.h"
#include "cc/cuda/kernels/pack.cuh"
#include "cc/cuda/kernels/quantize.cuh"

namespace jax_sm_free::cuda {
namespace {

// The number of 16-byte loads that a lane has in flight, and the number of blocks that the
// registers then leave room for.
constexpr int kUnroll = 4;
constexpr int kMinBlocks = 4;

// Quantises groups [first, end) of a row of whole 16-byte words, and writes them to every out_row.
// All lanes of the warp call it. Each lane keeps several loads in flight.
template <typename Format, typename T>
__device__ void PackWords(std::byte* out_row, const std::byte* x, int64_t hidden, int32_t first,
                          int32_t end) {
  using Scale = typename Format::Scale;
  constexpr int kLanes = kGroupLanes<Format, T>;
  static_assert(kUnroll <= kLanes);  // a lane keeps at most one scale
  const int lane = threadIdx.x % kWarpSize;
  const auto* words = reinterpret_cast<const uint4*>(x);
  const int32_t end_word = min(end * kLanes, static_cast<int32_t>(hidden / kLaneColumns<T>));
  for (; first < end; first += kUnroll * kWarpGroups<Format, T>) {
    const int32_t first_word = first * kLanes;
    uint4 loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int32_t i = first_word + u * kWarpSize + lane;
      loaded[u] = i < end_word ? __ldcs(words + i) : make_uint4(0, 0, 0, 0);
    }
    Codes<T> codes[kUnroll];
    Scale kept = 0;  // each lane keeps the scale of another group
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first_word + u * kWarpSize >= end_word) continue;
      float values[kLaneColumns<T>];
      ToFloats<T>(loaded[u], values);
      const GroupScale<Format> scale(LargestOfLanes<kLanes>(LargestMagnitude(values)));
      codes[u] = Quantize<T>(values, scale);
      if (lane % kLanes == u) kept = scale.scale();
    }
    const int32_t group = first + lane % kLanes * kWarpGroups<Format, T> + lane / kLanes;
    const bool keeps = lane % kLanes < kUnroll && group < end;
    ForEachOutRow(out_row, [&](std::byte* row) {
      auto* out = reinterpret_cast<Codes<T>*>(row);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int32_t i = first_word + u * kWarpSize + lane;
        if (i < end_word) __stcs(out + i, codes[u]);
      }
      if (keeps) __stcs(reinterpret_cast<Scale*>(row + hidden) + group, kept);
    });
  }
}

// The same for a row of any size. Its scales may start at any byte.
template <typename Format, typename T>
__device__ void PackColumns(std::byte* out_row, const std::byte* x, int64_t hidden, int32_t first,
                            int32_t end) {
  constexpr int kPerLane = Format::kScaleColumns / kWarpSize;
  constexpr int kScaleBytes = sizeof(typename Format::Scale);
  const int lane = threadIdx.x % kWarpSize;
  const auto* row = reinterpret_cast<const T*>(x);
  for (; first < end; ++first) {
    float values[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int64_t column = first * Format::kScaleColumns + i * kWarpSize + lane;
      values[i] = column < hidden ? ToFloat(row[column]) : 0.0F;
    }
    const GroupScale<Format> scale(LargestOfLanes<kWarpSize>(LargestMagnitude(values)));
    ForEachOutRow(out_row, [&](std::byte* out) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int64_t column = first * Format::kScaleColumns + i * kWarpSize + lane;
        if (column < hidden) out[column] = static_cast<std::byte>(scale.Quantize(values[i], 0.0F));
      }
      if (lane < kScaleBytes) {
        out[hidden + first * int64_t{kScaleBytes} + lane] = ScaleByte(scale.scale(), lane);
      }
    });
  }
}

template <typename Format, typename T>
__host__ __device__ Segments SegmentsOf(int64_t hidden) {
  return GroupSegments<Format>(hidden, kUnroll * kWarpGroups<Format, T>);
}

template <typename Format, typename T, int kWidth>
__global__ void __launch_bounds__(kRowThreads, kMinBlocks)
    PackQuantizedKernel(const RankView view, const PackArgs args) {
  const Matrix& matrix = args.format.matrix;
  const int64_t hidden = matrix.hidden;
  const Segments segments = SegmentsOf<Format, T>(hidden);
  // Rows for this rank itself are quantised, too.
  PackParts(view, segments, args.num_tokens, false, [&](std::byte* out_row, const Claim& at) {
    const std::byte* x = args.rows.values + at.row * matrix.row_bytes();
    const int32_t first = segments.begin(at.segment);
    const int32_t end = segments.end(at.segment);
    if constexpr (kWidth > 1) {
      PackWords<Format, T>(out_row, x, hidden, first, end);
    } else {
      PackColumns<Format, T>(out_row, x, hidden, first, end);
    }
  });
}

struct Launch {
  const RankView& view;
  const PackArgs& args;
  cudaStream_t stream;

  template <typename Format, typename T, int kWidth>
  void operator()() const {
    const auto kernel = PackQuantizedKernel<Format, T, kWidth>;
    static const int most = FullGrid(kernel);
    const int64_t warps =
        args.num_tokens * SegmentsOf<Format, T>(args.format.matrix.hidden).per_row;
    EnqueueBehind(kernel, {BlocksAndWatch(warps, most), kRowThreads}, stream, view, args);
  }
};

struct LoadAll {
  cudaError_t* error;

  template <typename Format, typename T, int kWidth>
  void operator()() const {
    if (*error == cudaSuccess) *error = Load(PackQuantizedKernel<Format, T, kWidth>);
  }
};

}  // namespace

void LaunchPackQuantized(const RankView& view, const PackArgs& args, cudaStream_t stream) {
  VisitQuantized(args.format, Launch{view, args, stream});
}

cudaError_t LoadPackQuantized() {
  cudaError_t error = cudaSuccess;
  ForEachQuantized(LoadAll{&error});
  return error;
}

}  // namespace jax_sm_free::cuda
