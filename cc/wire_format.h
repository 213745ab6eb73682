// How the rows of a dispatch travel. Each format is a type, which holds everything that differs
// between formats. Code for the host and kernels take the type as a template argument.
//
// A row on the wire is its values, followed by its scales. A plain row has the values and scales of
// the program. A format that quantises computes both from the values of the program: each value
// becomes one byte, and a group of neighbouring columns shares one scale.
//
// To add a format, add a value to WireFormat and to kWireFormats, a struct, and a case in
// VisitWireFormat.

#ifndef JAX_SM_FREE_CC_WIRE_FORMAT_H_
#define JAX_SM_FREE_CC_WIRE_FORMAT_H_

#include <bit>
#include <cstdint>

namespace jax_sm_free {

// Python gives the number of a format (jax_sm_free/wire_format.py).
enum class WireFormat : int32_t { kPlain = 0, kFloat8Block128 = 1 };
inline constexpr WireFormat kWireFormats[] = {WireFormat::kPlain, WireFormat::kFloat8Block128};

// A magnitude of float32 with these bits or larger ones is infinity or NaN.
inline constexpr uint32_t kInfinityBits = 0x7F800000U;
inline constexpr uint32_t kNanBits = 0x7FC00000U;

struct Plain {
  static constexpr bool kQuantizes = false;
};

// Values on the wire. The host converts them in cc/cpu/numeric.h, and kernels convert them in
// cc/cuda/kernels/quantize.cuh.
struct Float8E4M3;

// float8_e4m3fn values, and a float32 scale for each 128 columns. The docstring of
// jax_sm_free.Config has the formula.
struct Float8Block128 {
  static constexpr bool kQuantizes = true;
  using Value = Float8E4M3;
  using Scale = float;
  static constexpr int64_t kScaleColumns = 128;

  // The scale of a group. `largest` is the largest magnitude in the group, as bits. Bits of
  // magnitudes compare like the magnitudes.
  static constexpr Scale ScaleOf(uint32_t largest) {
    if (largest >= kInfinityBits) return std::bit_cast<float>(kNanBits);
    constexpr float kMinAmax = 1e-4F;
    constexpr float kMaxValue = 448.0F;
    const auto magnitude = std::bit_cast<float>(largest);
    return (magnitude > kMinAmax ? magnitude : kMinAmax) / kMaxValue;
  }

  // A value on the wire is column / factor, and becomes value * factor. The factor of a group with
  // NaN or infinity is NaN.
  static constexpr float FactorOf(Scale scale) { return scale; }
};

// Scales of a row. The last one may have fewer columns than the others.
template <typename Format>
constexpr int64_t NumScales(int64_t hidden) {
  return (hidden + Format::kScaleColumns - 1) / Format::kScaleColumns;
}

template <typename Format>
constexpr int64_t ScalesBytes(int64_t hidden) {
  return NumScales<Format>(hidden) * int64_t{sizeof(typename Format::Scale)};
}

// Calls fn<Format>() with the type of a format, and returns what it returns.
template <typename Fn>
constexpr auto VisitWireFormat(WireFormat format, const Fn& fn) {
  switch (format) {
    case WireFormat::kFloat8Block128:
      return fn.template operator()<Float8Block128>();
    case WireFormat::kPlain:
      break;
  }
  return fn.template operator()<Plain>();
}

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_WIRE_FORMAT_H_
