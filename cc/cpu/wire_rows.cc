#include "cc/cpu/wire_rows.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "cc/cpu/numeric.h"
#include "cc/wire_format.h"

namespace jax_sm_free {
namespace {

// No result here depends on a subnormal number, so it does not matter whether the thread flushes
// them.

template <typename Format, typename T>
typename Format::Scale QuantizeGroup(const typename T::Storage* x, int64_t size, uint8_t* values) {
  using Value = typename Format::Value;
  uint32_t largest = 0;  // the largest magnitude, as bits
  for (int64_t i = 0; i < size; ++i) {
    largest = std::max(largest, std::bit_cast<uint32_t>(T::Load(x[i])) & 0x7FFFFFFFU);
  }
  const typename Format::Scale scale = Format::ScaleOf(largest);
  const float factor = Format::FactorOf(scale);
  if (std::isnan(factor)) {
    std::fill_n(values, size, Value::kNan);
  } else {
    for (int64_t i = 0; i < size; ++i) values[i] = Value::Store(T::Load(x[i]) / factor);
  }
  return scale;
}

template <typename Format, typename T>
void QuantizeRows(const std::byte* x, int64_t num_rows, int64_t hidden, std::byte* values,
                  std::byte* scales) {
  const auto* in = reinterpret_cast<const typename T::Storage*>(x);
  auto* next_values = reinterpret_cast<uint8_t*>(values);
  auto* next_scale = reinterpret_cast<typename Format::Scale*>(scales);
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t first = 0; first < hidden; first += Format::kScaleColumns) {
      const int64_t size = std::min(Format::kScaleColumns, hidden - first);
      *next_scale++ = QuantizeGroup<Format, T>(in, size, next_values);
      in += size;
      next_values += size;
    }
  }
}

template <typename Format, typename T>
void DequantizeGroup(const uint8_t* values, int64_t size, float factor, typename T::Storage* out) {
  if (std::isnan(factor)) {
    std::fill_n(out, size, T::Store(std::bit_cast<float>(kNanBits)));
    return;
  }
  for (int64_t i = 0; i < size; ++i) out[i] = T::Store(Format::Value::Load(values[i]) * factor);
}

template <typename Format, typename T>
void DequantizeRow(int64_t hidden, const std::byte* wire, std::byte* out) {
  const auto* values = reinterpret_cast<const uint8_t*>(wire);
  const std::byte* scales = wire + hidden;
  auto* to = reinterpret_cast<typename T::Storage*>(out);
  for (int64_t first = 0; first < hidden; first += Format::kScaleColumns) {
    typename Format::Scale scale;
    std::memcpy(&scale, scales, sizeof(scale));  // aligned only if hidden is
    scales += sizeof(scale);
    DequantizeGroup<Format, T>(values + first, std::min(Format::kScaleColumns, hidden - first),
                               Format::FactorOf(scale), to + first);
  }
}

void CopyParts(const std::byte* wire, const MutableRows& out, int64_t row) {
  std::memcpy(out.values + row * out.values_bytes, wire, out.values_bytes);
  if (out.scales_bytes == 0) return;
  std::memcpy(out.scales + row * out.scales_bytes, wire + out.values_bytes, out.scales_bytes);
}

}  // namespace

WireRows::WireRows(const RowFormat& format, const ConstRows& rows, int64_t num_rows) : rows_(rows) {
  VisitWireFormat(format.wire, [&]<typename Format>() {
    if constexpr (Format::kQuantizes) {
      const int64_t hidden = format.matrix.hidden;
      const int64_t scales_bytes = ScalesBytes<Format>(hidden);
      values_ = std::make_unique_for_overwrite<std::byte[]>(num_rows * hidden);
      scales_ = std::make_unique_for_overwrite<std::byte[]>(num_rows * scales_bytes);
      VisitDType(format.matrix.dtype, [&]<typename T>() {
        QuantizeRows<Format, T>(rows.values, num_rows, hidden, values_.get(), scales_.get());
      });
      rows_ = {values_.get(), hidden, scales_.get(), scales_bytes};
    }
  });
}

void PutRow(const RowFormat& format, const std::byte* wire, const MutableRows& out, int64_t row) {
  VisitWireFormat(format.wire, [&]<typename Format>() {
    if constexpr (Format::kQuantizes) {
      std::byte* to = out.values + row * out.values_bytes;
      VisitDType(format.matrix.dtype,
                 [&]<typename T>() { DequantizeRow<Format, T>(format.matrix.hidden, wire, to); });
    } else {
      CopyParts(wire, out, row);
    }
  });
}

}  // namespace jax_sm_free
