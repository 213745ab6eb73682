// Exact conversions of element types to and from float32, and the floating-point mode of sums.

#ifndef JAX_SM_FREE_CC_CPU_NUMERIC_H_
#define JAX_SM_FREE_CC_CPU_NUMERIC_H_

#include <bit>
#include <cfenv>
#include <cstdint>

#include "cc/operands.h"

namespace jax_sm_free {

struct Float32 {
  using Storage = float;
  static float Load(float value) { return value; }
  static float Store(float value) { return value; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static float Load(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
  static uint16_t Store(float value) {  // to nearest, ties to even; NaN stays NaN
    const auto bits = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
    const uint32_t nan = (bits >> 16) | 0x40U;
    return static_cast<uint16_t>((bits & 0x7FFFFFFFU) > 0x7F800000U ? nan : rounded);
  }
};

struct Float16 {
  using Storage = uint16_t;
  static float Load(uint16_t half) {
    const uint32_t sign = uint32_t{half & 0x8000U} << 16;
    const uint32_t magnitude = half & 0x7FFFU;
    const uint32_t normal = (magnitude << 13) + (112U << 23);
    const uint32_t special = normal + (112U << 23);  // infinity and NaN
    const auto subnormal = std::bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24F);
    const uint32_t bits = magnitude >= 0x7C00U ? special : magnitude < 0x400U ? subnormal : normal;
    return std::bit_cast<float>(sign | bits);
  }
  static uint16_t Store(float value) {  // to nearest, ties to even; NaN stays NaN
    const auto bits = std::bit_cast<uint32_t>(value);
    const uint32_t magnitude = bits & 0x7FFFFFFFU;
    const uint32_t normal = (magnitude - (112U << 23) + 0xFFFU + ((magnitude >> 13) & 1U)) >> 13;
    // 0.5 has the spacing of half's subnormals, so that the addition rounds to it.
    const uint32_t subnormal =
        std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5F) - 0x3F000000U;
    const uint32_t finite = magnitude < 0x38800000U ? subnormal : normal;
    const uint32_t infinite = magnitude > 0x7F800000U ? 0x7E00U : 0x7C00U;
    const uint32_t half = magnitude >= 0x477FF000U ? infinite : finite;
    return static_cast<uint16_t>(((bits >> 16) & 0x8000U) | half);
  }
};

// Calls fn<Float32>(), fn<BFloat16>() or fn<Float16>(), and returns the result. The call is
// inlined: a function that is compiled for wider vectors then contains all of `fn`.
template <typename Fn>
__attribute__((always_inline)) inline auto VisitDType(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::kFloat32:
      return fn.template operator()<Float32>();
    case DType::kBFloat16:
      return fn.template operator()<BFloat16>();
    case DType::kFloat16:
      break;
  }
  return fn.template operator()<Float16>();
}

// float8_e4m3fn: four bits of exponent, three of mantissa, no infinities. 0x7F is NaN.
struct Float8E4M3 {
  using Storage = uint8_t;
  static constexpr uint8_t kNan = 0x7F;
  static float Load(uint8_t code) {
    const uint32_t sign = uint32_t{code & 0x80U} << 24;
    const uint32_t magnitude = code & 0x7FU;
    const uint32_t normal = (magnitude << 20) + (120U << 23);
    const auto subnormal = std::bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-9F);
    const uint32_t finite = magnitude < 8 ? subnormal : normal;
    return std::bit_cast<float>(sign | (magnitude == kNan ? 0x7FC00000U : finite));
  }
  static uint8_t Store(float value) {  // to nearest, ties to even, at most 448; NaN stays NaN
    const auto bits = std::bit_cast<uint32_t>(value);
    const uint32_t magnitude = bits & 0x7FFFFFFFU;
    const uint32_t normal = (magnitude - (120U << 23) + 0x7FFFFU + ((magnitude >> 20) & 1U)) >> 20;
    // 2^14 has the spacing of the subnormals, so that the addition rounds to it.
    const uint32_t subnormal =
        std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0x1p14F) - 0x46800000U;
    const uint32_t rounded = magnitude < 0x3C800000U ? subnormal : normal;
    const uint32_t finite = rounded > 0x7EU ? 0x7EU : rounded;
    return static_cast<uint8_t>(((bits >> 24) & 0x80U) |
                                (magnitude > 0x7F800000U ? uint32_t{kNan} : finite));
  }
};

// The floating-point mode of a thread: rounding, and whether subnormals are flushed. XLA's threads
// flush them and ours do not. Without this class, sums would depend on the thread.
class FloatMode {
 public:
  FloatMode() { (void)std::fegetenv(&mode_); }
  void Apply() const { (void)std::fesetenv(&mode_); }

 private:
  std::fenv_t mode_;
};

// IEEE arithmetic, which keeps subnormals, until the end of the scope.
class IeeeScope {
 public:
  IeeeScope() { (void)std::fesetenv(FE_DFL_ENV); }
  ~IeeeScope() { outer_.Apply(); }
  IeeeScope(const IeeeScope&) = delete;
  IeeeScope& operator=(const IeeeScope&) = delete;

 private:
  const FloatMode outer_;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_NUMERIC_H_
