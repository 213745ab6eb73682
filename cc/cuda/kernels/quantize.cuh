// Converts rows to and from a format that quantises them (cc/wire_format.h). A warp does this, and
// computes the same bits as cc/cpu/wire_rows.cc.
//
// In template arguments, Format is the format of the wire, and T is the element type of the rows.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_QUANTIZE_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_QUANTIZE_CUH_

#include <cuda_fp8.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/elements.cuh"
#include "cc/operands.h"
#include "cc/wire_format.h"

namespace jax_sm_free::cuda {

// The number of columns of a row that a lane holds. They take 16 bytes of T, and as many bytes of
// values as there are columns.
template <typename T>
inline constexpr int kLaneColumns = 16 / sizeof(T);
template <typename T>
using Codes = std::conditional_t<kLaneColumns<T> == 8, uint2, uint32_t>;

// The number of lanes that hold the columns of one scale, and the number of such groups of lanes in
// a warp.
template <typename Format, typename T>
inline constexpr int kGroupLanes = Format::kScaleColumns / kLaneColumns<T>;
template <typename Format, typename T>
inline constexpr int kWarpGroups = kWarpSize / kGroupLanes<Format, T>;

// Segments of at most `max_groups` groups. The words that Segments counts stand for groups.
template <typename Format>
__host__ __device__ Segments GroupSegments(int64_t hidden, int32_t max_groups) {
  return Segments(NumScales<Format>(hidden) * 16, max_groups);
}

// Calls fn<Format, T, kWidth>() with the types for rows that the wire quantises. VisitElement
// describes T and kWidth.
template <typename Fn>
void VisitQuantized(const RowFormat& format, const Fn& fn) {
  VisitWireFormat(format.wire, [&]<typename Format>() {
    if constexpr (Format::kQuantizes) {
      VisitElement(format.matrix,
                   [&]<typename T, int kWidth>() { fn.template operator()<Format, T, kWidth>(); });
    }
  });
}

// Calls fn<Format, T, kWidth>() for everything that VisitQuantized chooses from.
template <typename Fn>
void ForEachQuantized(const Fn& fn) {
  for (const WireFormat wire : kWireFormats) {
    VisitWireFormat(wire, [&]<typename Format>() {
      if constexpr (Format::kQuantizes) {
        ForEachElement(
            [&]<typename T, int kWidth>() { fn.template operator()<Format, T, kWidth>(); });
      }
    });
  }
}

// Calls fn(row) for the out_row of each lane that has one.
template <typename Fn>
__device__ void ForEachOutRow(std::byte* out_row, const Fn& fn) {
  for (unsigned left = __ballot_sync(kFullWarp, out_row != nullptr); left != 0; left &= left - 1) {
    fn(ShufflePointer(out_row, __ffs(static_cast<int>(left)) - 1));
  }
}

// The largest magnitude, as bits. Bits of magnitudes compare like the magnitudes.
template <int kSize>
__device__ inline uint32_t LargestMagnitude(const float (&values)[kSize]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    largest = max(largest, __float_as_uint(values[i]) & 0x7FFFFFFFU);
  }
  return largest;
}

// The largest value among each kLanes neighbouring lanes. All of them get it.
template <int kLanes>
__device__ inline uint32_t LargestOfLanes(uint32_t largest) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    largest = max(largest, __shfl_xor_sync(kFullWarp, largest, offset));
  }
  return largest;
}

// Converts pairs of values on the wire to and from float32. The first value is in the low byte.
template <typename Value>
struct ValuePair;
template <>
struct ValuePair<Float8E4M3> {
  static __device__ uint32_t Store(float2 values) {
    return __nv_cvt_float2_to_fp8x2(values, __NV_SATFINITE, __NV_E4M3);
  }
  static __device__ float2 Load(uint32_t codes) {
    const __half2_raw halves =
        __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3);
    return __half22float2(__half2(halves));
  }
};

// The scale of a group of columns.
template <typename Format>
class GroupScale {
 public:
  using Scale = typename Format::Scale;

  // `largest`: the largest magnitude of the group, as bits.
  __device__ explicit GroupScale(uint32_t largest) {
    scale_ = Format::ScaleOf(largest);
    factor_ = Format::FactorOf(scale_);
    reciprocal_ = __frcp_rn(factor_);
  }

  __device__ Scale scale() const { return scale_; }

  // Two columns as values. The first value is in the low byte.
  __device__ uint32_t Quantize(float first, float second) const {
    return ValuePair<typename Format::Value>::Store({Divide(first), Divide(second)});
  }

 private:
  // Returns x / factor_, rounded as IEEE requires, at a third of the cost of a division. After the
  // first correction, the quotient is within one unit in the last place, so the second correction
  // is exact (Markstein; the reciprocal must be rounded to nearest). The only quotients near
  // underflow are those that become zero.
  __device__ float Divide(float x) const {
    float quotient = __fmul_rn(x, reciprocal_);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      quotient = __fmaf_rn(__fmaf_rn(-factor_, quotient, x), reciprocal_, quotient);
    }
    return copysignf(quotient, x);  // a correction turns -0 into +0
  }

  Scale scale_;
  float factor_;
  float reciprocal_;
};

// Reads a scale that may start at any byte.
template <typename Scale>
__device__ Scale ScaleAt(const std::byte* bytes) {
  Scale scale;
  memcpy(&scale, bytes, sizeof(scale));
  return scale;
}

// Byte `i` of a scale.
template <typename Scale>
__device__ std::byte ScaleByte(Scale scale, int i) {
  uint32_t bits = 0;
  static_assert(sizeof(scale) <= sizeof(bits));
  memcpy(&bits, &scale, sizeof(scale));
  return static_cast<std::byte>(bits >> 8 * i);
}

// The float32 values of the 16 bytes that a lane has loaded.
template <typename T>
__device__ inline void ToFloats(const uint4& word, float (&values)[kLaneColumns<T>]) {
  const auto& vector = reinterpret_cast<const Vector<T, kLaneColumns<T>>&>(word);
#pragma unroll
  for (int i = 0; i < kLaneColumns<T>; ++i) values[i] = ToFloat(vector.elements[i]);
}

// The columns of a lane as values.
template <typename T, typename Format>
__device__ inline Codes<T> Quantize(const float (&values)[kLaneColumns<T>],
                                    const GroupScale<Format>& scale) {
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

// Two columns from their values. The first value is in the low byte.
template <typename Format>
__device__ inline float2 DequantizePair(uint32_t codes, float factor) {
  const float2 values = ValuePair<typename Format::Value>::Load(codes);
  return {__fmul_rn(values.x, factor), __fmul_rn(values.y, factor)};
}

// Packs two values into a 32-bit word of T (kNanWord is a word of NaNs).
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

// The columns of a lane from their values.
template <typename Format, typename T>
__device__ inline uint4 Dequantize(const Codes<T>& codes, float factor) {
  constexpr uint32_t kNan = kNanWord<T>;
  if (isnan(factor)) return make_uint4(kNan, kNan, kNan, kNan);
  if constexpr (kLaneColumns<T> == 8) {
    const auto pair = [factor](uint32_t two) {
      return PackPair<T>(DequantizePair<Format>(two, factor));
    };
    return make_uint4(pair(codes.x & 0xFFFFU), pair(codes.x >> 16), pair(codes.y & 0xFFFFU),
                      pair(codes.y >> 16));
  } else {
    const float2 low = DequantizePair<Format>(codes & 0xFFFFU, factor);
    const float2 high = DequantizePair<Format>(codes >> 16, factor);
    return make_uint4(__float_as_uint(low.x), __float_as_uint(low.y), __float_as_uint(high.x),
                      __float_as_uint(high.y));
  }
}

// One column from its value.
template <typename Format, typename T>
__device__ inline T DequantizeOne(uint8_t code, float factor) {
  const uint32_t nan = kNanWord<T>;
  return isnan(factor) ? reinterpret_cast<const T&>(nan)
                       : FromFloat<T>(DequantizePair<Format>(code, factor).x);
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_QUANTIZE_CUH_
