// Sums of rows by a warp: both sides of a combine.

#ifndef JAX_SM_FREE_CC_CUDA_ROWS_CUH_
#define JAX_SM_FREE_CC_CUDA_ROWS_CUH_

#include <cstddef>
#include <cstdint>

#include "cc/cuda/device.cuh"
#include "cc/cuda/elements.cuh"

namespace jax_sm_free::cuda {

// The terms of a sum, one in each lane whose bit is set in `present`, added in lane order.
struct Terms {
  unsigned present = 0;
  const std::byte* row = nullptr;  // this lane's
  float weight = 1;                // this lane's
};

// Vectors [first, end) of out = sum over the terms of weight * row, from zero, in float32, cast
// once. kWeighted false: a plain sum. kLoads: loads of a lane in flight. All lanes of the warp call
// it.
template <typename T, int kWidth, bool kWeighted, int kLoads>
__device__ void WarpSum(const Terms& terms, int32_t first, int32_t end, std::byte* out) {
  using V = Vector<T, kWidth>;
  constexpr int kUnroll = kWidth == 1 ? 1 : kLoads;
  const int lane = threadIdx.x % kWarpSize;
  for (; first < end; first += kUnroll * kWarpSize) {
    float total[kUnroll][kWidth] = {};
    for (unsigned left = terms.present; left != 0; left &= left - 1) {
      const int source = __ffs(static_cast<int>(left)) - 1;
      const auto* row = reinterpret_cast<const V*>(ShufflePointer(terms.row, source)) + lane;
      const float weight = kWeighted ? __shfl_sync(kFullWarp, terms.weight, source) : 1.0F;
      V loaded[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int32_t i = first + u * kWarpSize;
        if (i + lane < end) loaded[u] = row[i];
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
          const float value = ToFloat(loaded[u].elements[c]);
          total[u][c] = __fadd_rn(total[u][c], kWeighted ? __fmul_rn(weight, value) : value);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int32_t i = first + u * kWarpSize + lane;
      if (i >= end) continue;
      V sum;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) sum.elements[c] = FromFloat<T>(total[u][c]);
      reinterpret_cast<V*>(out)[i] = sum;
    }
  }
}

// The vectors of one segment of a row: 16-byte words, or the elements of a row that has none.
template <int kWidth>
__device__ int32_t FirstVector(const Segments& segments, int32_t segment) {
  return kWidth == 1 ? 0 : segments.begin(segment);
}
template <int kWidth>
__device__ int32_t EndVector(const Segments& segments, int32_t segment, int64_t hidden) {
  return kWidth == 1 ? static_cast<int32_t>(hidden) : segments.end(segment);
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_ROWS_CUH_
