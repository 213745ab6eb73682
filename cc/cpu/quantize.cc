#include "cc/cpu/quantize.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "cc/cpu/numeric.h"
#include "cc/quantized.h"

namespace jax_sm_free {
namespace {

// No result here depends on a subnormal number: whether the thread flushes them makes no
// difference.

// Returns the scale.
template <typename T>
float QuantizeGroup(const typename T::Storage* x, int64_t size, uint8_t* values) {
  uint32_t largest = 0;  // of the magnitudes, as bits, which have the order of the numbers
  for (int64_t i = 0; i < size; ++i) {
    largest = std::max(largest, std::bit_cast<uint32_t>(T::Load(x[i])) & 0x7FFFFFFFU);
  }
  if (largest >= kInfinityBits) {
    std::fill_n(values, size, kNanFloat8);
    return std::bit_cast<float>(kNanScaleBits);
  }
  const float scale = std::max(std::bit_cast<float>(largest), kMinAmax) / kMaxFloat8;
  for (int64_t i = 0; i < size; ++i) values[i] = Float8E4M3::Store(T::Load(x[i]) / scale);
  return scale;
}

template <typename T>
void QuantizeRows(const std::byte* x, int64_t num_rows, int64_t hidden, uint8_t* values,
                  float* scales) {
  const auto* in = reinterpret_cast<const typename T::Storage*>(x);
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t first = 0; first < hidden; first += kScaleColumns) {
      const int64_t size = std::min(kScaleColumns, hidden - first);
      *scales++ = QuantizeGroup<T>(in, size, values);
      in += size;
      values += size;
    }
  }
}

template <typename T>
void DequantizeGroup(const uint8_t* values, int64_t size, float scale, typename T::Storage* out) {
  if (std::isnan(scale)) {
    std::fill_n(out, size, T::Store(std::bit_cast<float>(kNanScaleBits)));
    return;
  }
  for (int64_t i = 0; i < size; ++i) out[i] = T::Store(Float8E4M3::Load(values[i]) * scale);
}

template <typename T>
void DequantizeAs(int64_t hidden, const std::byte* wire, std::byte* out) {
  const auto* values = reinterpret_cast<const uint8_t*>(wire);
  const std::byte* scales = wire + hidden;
  auto* to = reinterpret_cast<typename T::Storage*>(out);
  for (int64_t first = 0; first < hidden; first += kScaleColumns) {
    float scale = 0;
    std::memcpy(&scale, scales, sizeof(scale));  // aligned only where hidden is
    scales += sizeof(scale);
    DequantizeGroup<T>(values + first, std::min(kScaleColumns, hidden - first), scale, to + first);
  }
}

}  // namespace

QuantizedRows::QuantizedRows(const Matrix& matrix, const std::byte* x, int64_t num_rows)
    : hidden_(matrix.hidden),
      values_(std::make_unique_for_overwrite<uint8_t[]>(num_rows * hidden_)),
      scales_(std::make_unique_for_overwrite<float[]>(num_rows * NumScales(hidden_))) {
  VisitDType(matrix.dtype, [&]<typename T>() {
    QuantizeRows<T>(x, num_rows, hidden_, values_.get(), scales_.get());
  });
}

ConstRows QuantizedRows::rows() const {
  return {.values = reinterpret_cast<const std::byte*>(values_.get()),
          .values_bytes = hidden_,
          .scales = reinterpret_cast<const std::byte*>(scales_.get()),
          .scales_bytes = NumScales(hidden_) * int64_t{sizeof(float)}};
}

void DequantizeRow(const Matrix& matrix, const std::byte* wire, std::byte* out) {
  VisitDType(matrix.dtype, [&]<typename T>() { DequantizeAs<T>(matrix.hidden, wire, out); });
}

}  // namespace jax_sm_free
