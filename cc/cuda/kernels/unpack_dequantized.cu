// The rows of a dispatch from their messages, in a format that quantises them. Each token row is
// read and dequantised once, however many expert rows it becomes.

#include <cuda_runtime.h>

#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/elements.cuh"
#include "cc/cuda/kernels/kernels.h"
#include "cc/cuda/kernels/launch.h"
#include "cc/cuda/kernels/quantize.cuh"
#include "cc/cuda/kernels/unpack.cuh"
#include "cc/cuda/kernels/unpack_experts.cuh"
#include "cc/cuda/kernels/unpack_tokens.cuh"

namespace jax_sm_free::cuda {
namespace {

// The number of loads that a lane has in flight, and the number of blocks that the registers then
// leave room for.
constexpr int kUnroll = 8;
constexpr int kMinBlocks = 3;

// Dequantises groups [first, end) of a row that becomes whole 16-byte words, and writes them to
// every out_row. All lanes of the warp call it. Each lane keeps several loads in flight.
template <typename Format, typename T>
__device__ void UnpackWords(std::byte* out_row, const std::byte* wire, int64_t hidden,
                            int32_t first, int32_t end) {
  using Scale = typename Format::Scale;
  constexpr int kLanes = kGroupLanes<Format, T>;
  constexpr int kStep = kWarpGroups<Format, T>;  // groups in the words that a warp loads at once
  constexpr int kGroups = kUnroll * kStep;
  constexpr int kHeld = (kGroups + kWarpSize - 1) / kWarpSize;  // scales that a lane holds
  const int lane = threadIdx.x % kWarpSize;
  const auto* codes = reinterpret_cast<const Codes<T>*>(wire);
  const auto* scales = reinterpret_cast<const Scale*>(wire + hidden);
  const int32_t end_word = min(end * kLanes, static_cast<int32_t>(hidden / kLaneColumns<T>));
  for (; first < end; first += kGroups) {
    const int32_t first_word = first * kLanes + lane;
    Codes<T> loaded[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int32_t i = first_word + u * kWarpSize;
      if (i < end_word) loaded[u] = __ldcs(codes + i);
    }
    float held[kHeld];
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int32_t i = h * kWarpSize + lane;
      const bool holds = i < kGroups && first + i < end;
      held[h] = holds ? Format::FactorOf(__ldcs(scales + first + i)) : 0.0F;
    }
    uint4 words[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const float factor = __shfl_sync(kFullWarp, held[u * kStep / kWarpSize],
                                       u * kStep % kWarpSize + lane / kLanes);
      words[u] = Dequantize<Format, T>(loaded[u], factor);
    }
    ForEachOutRow(out_row, [&](std::byte* row) {
      auto* out = reinterpret_cast<uint4*>(row);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int32_t i = first_word + u * kWarpSize;
        if (i < end_word) __stcs(out + i, words[u]);
      }
    });
  }
}

// The same for a row of any size.
template <typename Format, typename T>
__device__ void UnpackColumns(std::byte* out_row, const std::byte* wire, int64_t hidden,
                              int32_t first, int32_t end) {
  const int lane = threadIdx.x % kWarpSize;
  using Scale = typename Format::Scale;
  const int64_t end_column = min(end * Format::kScaleColumns, hidden);
  for (int64_t i = first * Format::kScaleColumns; i < end_column; i += kWarpSize) {
    const auto* scale = wire + hidden + i / Format::kScaleColumns * int64_t{sizeof(Scale)};
    const float factor = Format::FactorOf(ScaleAt<Scale>(scale));
    const int64_t column = i + lane;
    const auto code = column < end_column ? static_cast<uint8_t>(wire[column]) : uint8_t{0};
    const T value = DequantizeOne<Format, T>(code, factor);
    ForEachOutRow(out_row, [&](std::byte* row) {
      if (column < end_column) reinterpret_cast<T*>(row)[column] = value;
    });
  }
}

template <typename Format, typename T, int kWidth>
__device__ void UnpackGroups(std::byte* out_row, const std::byte* wire, int64_t hidden,
                             int32_t first, int32_t end) {
  if constexpr (kWidth > 1) {
    UnpackWords<Format, T>(out_row, wire, hidden, first, end);
  } else {
    UnpackColumns<Format, T>(out_row, wire, hidden, first, end);
  }
}

template <typename Format, typename T, int kWidth>
__global__ void __launch_bounds__(kRowThreads, kMinBlocks)
    UnpackExpertsDequantizedKernel(const RankView view, const UnpackExpertsArgs out,
                                   const int64_t hidden, const Turn turn, const Turn next) {
  const Segments segments = GroupSegments<Format>(hidden, kUnroll * kWarpGroups<Format, T>);
  TakeTurn(view, out, turn, next, [&](const TurnRows& rows) {
    Claims claims(view.state, segments, rows.size(), WarpsOfGrid());
    for (Claim at = claims.Next(); at.row < rows.size(); at = claims.Next()) {
      const TokenRow from = rows.at(at.row);
      const int32_t segment = at.segment;
      std::byte* out_row = ExpertOutRow(out, ExpertRow(view, from, out, segment == 0));
      UnpackGroups<Format, T, kWidth>(out_row, from.bytes().values, hidden, segments.begin(segment),
                                      segments.end(segment));
    }
  });
}

template <typename Format, typename T, int kWidth>
__global__ void __launch_bounds__(kRowThreads, kMinBlocks)
    UnpackTokensDequantizedKernel(const RankView view, const UnpackTokensArgs out,
                                  const int64_t hidden) {
  const auto num_groups = static_cast<int32_t>(NumScales<Format>(hidden));
  UnpackTokens(view, out, [&](const TokenRow& from, int64_t i) {
    const bool first_lane = threadIdx.x % kWarpSize == 0;
    std::byte* out_row = first_lane ? out.rows.values + i * out.rows.values_bytes : nullptr;
    UnpackGroups<Format, T, kWidth>(out_row, from.bytes().values, hidden, 0, num_groups);
  });
}

struct LaunchExpertsTurn {
  const RankView& view;
  const UnpackExpertsArgs& out;
  int64_t hidden;
  const Turn& turn;
  const Turn& next;
  cudaStream_t stream;

  template <typename Format, typename T, int kWidth>
  void operator()() const {
    const auto kernel = UnpackExpertsDequantizedKernel<Format, T, kWidth>;
    static const int blocks = FullGrid(kernel);
    EnqueueBehind(kernel, {blocks, kRowThreads}, stream, view, out, hidden, turn, next);
  }
};

struct LaunchTokens {
  const RankView& view;
  const UnpackTokensArgs& out;
  int64_t hidden;
  cudaStream_t stream;

  template <typename Format, typename T, int kWidth>
  void operator()() const {
    const auto kernel = UnpackTokensDequantizedKernel<Format, T, kWidth>;
    static const int blocks = FullGrid(kernel);
    EnqueueBehind(kernel, {blocks, kRowThreads}, stream, view, out, hidden);
  }
};

struct LoadAll {
  cudaError_t* error;

  template <typename Format, typename T, int kWidth>
  void operator()() const {
    if (*error == cudaSuccess) *error = Load(UnpackExpertsDequantizedKernel<Format, T, kWidth>);
    if (*error == cudaSuccess) *error = Load(UnpackTokensDequantizedKernel<Format, T, kWidth>);
  }
};

}  // namespace

void LaunchUnpackExpertsDequantized(const RankView& view, const UnpackExpertsArgs& out,
                                    cudaStream_t stream) {
  LaunchPlan(view, out, stream);
  ForEachTurn(view.config, out.all_here, [&](const Turn& turn, const Turn& next) {
    VisitQuantized(out.format,
                   LaunchExpertsTurn{view, out, out.format.matrix.hidden, turn, next, stream});
  });
}

void LaunchUnpackTokensDequantized(const RankView& view, const UnpackTokensArgs& out,
                                   cudaStream_t stream) {
  VisitQuantized(out.format, LaunchTokens{view, out, out.format.matrix.hidden, stream});
}

cudaError_t LoadUnpackDequantized() {
  cudaError_t error = cudaSuccess;
  ForEachQuantized(LoadAll{&error});
  return error;
}

}  // namespace jax_sm_free::cuda
