// Rows to and from a float8 wire (cc/quantized.h) by a warp, with the bits of cc/cpu/quantize.cc.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_QUANTIZE_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_QUANTIZE_CUH_

#include <cuda_fp8.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/elements.cuh"
#include "cc/quantized.h"

namespace jax_sm_free::cuda {

// Columns of a row that a lane holds: 16 bytes of T, and as many float8 values.
template <typename T>
inline constexpr int kLaneColumns = 16 / sizeof(T);
template <typename T>
using Codes = std::conditional_t<kLaneColumns<T> == 8, uint2, uint32_t>;

// Lanes that hold the columns of one scale, and such groups of a warp.
template <typename T>
inline constexpr int kGroupLanes = kScaleColumns / kLaneColumns<T>;
template <typename T>
inline constexpr int kWarpGroups = kWarpSize / kGroupLanes<T>;

// Rows in segments of at most `max_groups`, counted in place of words.
__host__ __device__ inline Segments GroupSegments(int64_t hidden, int32_t max_groups) {
  return Segments(NumScales(hidden) * 16, max_groups);
}

// Calls fn(row) for each row that a lane of the warp has as `target`.
template <typename Fn>
__device__ void ForEachTarget(std::byte* target, const Fn& fn) {
  for (unsigned left = __ballot_sync(kFullWarp, target != nullptr); left != 0; left &= left - 1) {
    fn(ShufflePointer(target, __ffs(static_cast<int>(left)) - 1));
  }
}

// The largest magnitude, as bits, which have the order of the numbers.
template <int kSize>
__device__ inline uint32_t LargestMagnitude(const float (&values)[kSize]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    largest = max(largest, __float_as_uint(values[i]) & 0x7FFFFFFFU);
  }
  return largest;
}

// The largest among each kLanes neighbours, in all of them.
template <int kLanes>
__device__ inline uint32_t LargestOfLanes(uint32_t largest) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    largest = max(largest, __shfl_xor_sync(kFullWarp, largest, offset));
  }
  return largest;
}

class GroupScale {
 public:
  // `largest`: the bits of the group's largest magnitude.
  __device__ explicit GroupScale(uint32_t largest) {
    scale_ = largest >= kInfinityBits
                 ? __uint_as_float(kNanScaleBits)
                 : __fdiv_rn(fmaxf(__uint_as_float(largest), kMinAmax), kMaxFloat8);
    reciprocal_ = __frcp_rn(scale_);
  }

  __device__ float scale() const { return scale_; }

  // Two columns as float8, the first one in the low byte.
  __device__ uint32_t Quantize(float first, float second) const {
    return __nv_cvt_float2_to_fp8x2({Divide(first), Divide(second)}, __NV_SATFINITE, __NV_E4M3);
  }

 private:
  // x / scale_ as IEEE rounds it, at a third of the cost: the first correction brings the quotient
  // within one unit in the last place, from where the second is exact (Markstein, with a reciprocal
  // that is rounded to nearest). Only quotients that become zero are ever near underflow.
  __device__ float Divide(float x) const {
    float quotient = __fmul_rn(x, reciprocal_);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      quotient = __fmaf_rn(__fmaf_rn(-scale_, quotient, x), reciprocal_, quotient);
    }
    return copysignf(quotient, x);  // a correction of -0 is +0
  }

  float scale_;
  float reciprocal_;
};

// The float32 values of the 16 bytes that a lane has loaded.
template <typename T>
__device__ inline void ToFloats(const uint4& word, float (&values)[kLaneColumns<T>]) {
  const auto& vector = reinterpret_cast<const Vector<T, kLaneColumns<T>>&>(word);
#pragma unroll
  for (int i = 0; i < kLaneColumns<T>; ++i) values[i] = ToFloat(vector.elements[i]);
}

// A lane's columns as float8.
template <typename T>
__device__ inline Codes<T> Quantize(const float (&values)[kLaneColumns<T>],
                                    const GroupScale& scale) {
  const auto four = [&](int i) {
    return scale.Quantize(values[i], values[i + 1]) | scale.Quantize(values[i + 2], values[i + 3])
                                                          << 16;
  };
  if constexpr (kLaneColumns<T> == 8) {
    return make_uint2(four(0), four(4));
  } else {
    return four(0);
  }
}

// Two columns from float8, the first one from the low byte.
__device__ inline float2 DequantizePair(uint32_t codes, float scale) {
  const __half2_raw halves =
      __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3);
  const float2 values = __half22float2(__half2(halves));
  return {__fmul_rn(values.x, scale), __fmul_rn(values.y, scale)};
}

// A 32-bit word of T, or one of T's NaNs.
template <typename T>
__device__ inline uint32_t PackPair(float2 values);
template <>
__device__ inline uint32_t PackPair<__nv_bfloat16>(float2 values) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(values.x, values.y);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ inline uint32_t PackPair<__half>(float2 values) {
  const __half2 pair = __floats2half2_rn(values.x, values.y);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <typename T>
inline constexpr uint32_t kNanWord = 0x7FC00000U;
template <>
inline constexpr uint32_t kNanWord<__nv_bfloat16> = 0x7FC07FC0U;
template <>
inline constexpr uint32_t kNanWord<__half> = 0x7E007E00U;

// A lane's columns from float8.
template <typename T>
__device__ inline uint4 Dequantize(const Codes<T>& codes, float scale) {
  constexpr uint32_t kNan = kNanWord<T>;
  if (isnan(scale)) return make_uint4(kNan, kNan, kNan, kNan);
  if constexpr (kLaneColumns<T> == 8) {
    const auto pair = [scale](uint32_t two) { return PackPair<T>(DequantizePair(two, scale)); };
    return make_uint4(pair(codes.x & 0xFFFFU), pair(codes.x >> 16), pair(codes.y & 0xFFFFU),
                      pair(codes.y >> 16));
  } else {
    const float2 low = DequantizePair(codes & 0xFFFFU, scale);
    const float2 high = DequantizePair(codes >> 16, scale);
    return make_uint4(__float_as_uint(low.x), __float_as_uint(low.y), __float_as_uint(high.x),
                      __float_as_uint(high.y));
  }
}

// One column from float8.
template <typename T>
__device__ inline T DequantizeOne(uint8_t code, float scale) {
  const uint32_t nan = kNanWord<T>;
  return isnan(scale) ? reinterpret_cast<const T&>(nan)
                      : FromFloat<T>(DequantizePair(code, scale).x);
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_QUANTIZE_CUH_
