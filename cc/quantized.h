// Rows on a float8 wire (Config::float8_wire): values and scales of a row side by side, as a
// (values, scales) pair travels. The formula is in the docstring of jax_sm_free.Config.

#ifndef JAX_SM_FREE_CC_QUANTIZED_H_
#define JAX_SM_FREE_CC_QUANTIZED_H_

#include <cstdint>

#include "cc/operands.h"

namespace jax_sm_free {

inline constexpr int64_t kScaleColumns = 128;  // a scale's; the last one of a row may have fewer
inline constexpr float kMinAmax = 1e-4F;
inline constexpr float kMaxFloat8 = 448.0F;

// Magnitudes of float32 from here on are infinity and NaN, which make all of their group NaN.
inline constexpr uint32_t kInfinityBits = 0x7F800000U;
// What that group's scale is, and each of its values.
inline constexpr uint32_t kNanScaleBits = 0x7FC00000U;
inline constexpr uint8_t kNanFloat8 = 0x7F;

constexpr int64_t NumScales(int64_t hidden) { return (hidden + kScaleColumns - 1) / kScaleColumns; }

// Bytes of a row on the wire: of its values, which come first, and of its float32 scales.
constexpr int64_t QuantizedRowBytes(const Matrix& matrix) {
  return matrix.hidden + NumScales(matrix.hidden) * int64_t{4};
}

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_QUANTIZED_H_
