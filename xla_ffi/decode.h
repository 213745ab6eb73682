// Operands of XLA FFI calls as views, and who calls: what all platforms' handlers share.

#ifndef JAX_SM_FREE_XLA_FFI_DECODE_H_
#define JAX_SM_FREE_XLA_FFI_DECODE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "cc/config.h"
#include "cc/fault.h"
#include "cc/op.h"
#include "cc/operands.h"
#include "cc/quantized.h"
#include "cc/runtime.h"
#include "xla/ffi/api/ffi.h"

namespace jax_sm_free {

namespace ffi = xla::ffi;
using S32 = ffi::Buffer<ffi::S32>;
using F32 = ffi::Buffer<ffi::F32>;
template <typename T>
using Out = ffi::Result<T>;

// Finds the buffer that a program's name for it means, if that is one of `T`.
template <typename T>
ffi::Error FindBuffer(Op op, std::string_view name, std::shared_ptr<T>& buffer) {
  Result<std::shared_ptr<Buffer>> found = Registry::Get().FindFor(name);
  if (Fault* fault = std::get_if<Fault>(&found)) {
    fault->op = OpName(op);
    return {ffi::ErrorCode::kFailedPrecondition, fault->Describe()};
  }
  buffer = std::dynamic_pointer_cast<T>(std::get<0>(std::move(found)));
  if (buffer != nullptr) return ffi::Error::Success();
  return {ffi::ErrorCode::kFailedPrecondition, std::string("jax_sm_free: ") + OpName(op) +
                                                   ": expected a buffer of this platform, seen " +
                                                   std::string(name)};
}

// Why an op finds no rank to work for.
inline ffi::Error IsOutside(Op op, int64_t buffer_id, int32_t device) {
  return {ffi::ErrorCode::kFailedPrecondition,
          std::string("jax_sm_free: ") + OpName(op) + ": expected a device of the mesh of buffer " +
              std::to_string(buffer_id) + ", seen device " + std::to_string(device)};
}

// Bytes of one row: of everything behind the first dimension.
inline int64_t RowBytes(const ffi::AnyBuffer& buffer) {
  const auto dims = buffer.dimensions();
  auto bytes = static_cast<int64_t>(ffi::ByteWidth(buffer.element_type()));
  for (size_t i = 1; i < dims.size(); ++i) bytes *= dims[i];
  return bytes;
}

inline ConstRows RowsOf(const ffi::AnyBuffer& values, const ffi::AnyBuffer& scales) {
  return {static_cast<const std::byte*>(values.untyped_data()), RowBytes(values),
          static_cast<const std::byte*>(scales.untyped_data()), RowBytes(scales)};
}

inline MutableRows RowsOf(Out<ffi::AnyBuffer>& values, Out<ffi::AnyBuffer>& scales) {
  return {static_cast<std::byte*>(values->untyped_data()), RowBytes(*values),
          static_cast<std::byte*>(scales->untyped_data()), RowBytes(*scales)};
}

inline Matrix MatrixOf(const ffi::AnyBuffer& buffer) {
  Matrix matrix{.hidden = buffer.dimensions()[1]};
  if (buffer.element_type() == ffi::BF16) matrix.dtype = DType::kBFloat16;
  if (buffer.element_type() == ffi::F16) matrix.dtype = DType::kFloat16;
  return matrix;
}

// What `values` are where this buffer's wire quantises them.
inline std::optional<Matrix> QuantizedOf(const Config& config, const ffi::AnyBuffer& values) {
  if (!config.float8_wire) return std::nullopt;
  return MatrixOf(values);
}

inline LayoutIn LayoutOf(const S32& rows, const S32& num_rows_from, int64_t num_rows) {
  return {rows.typed_data(), num_rows_from.typed_data(), static_cast<int32_t>(rows.dimensions()[1]),
          num_rows};
}

// An operand without elements stands for one that is absent.
template <typename T>
auto* DataOrNull(T& buffer) {
  return buffer.element_count() == 0 ? nullptr : buffer.typed_data();
}

// Bytes that a row of a dispatch travels as.
inline int64_t WireBytes(const std::optional<Matrix>& quantized, int64_t row_bytes) {
  return quantized ? QuantizedRowBytes(*quantized) : row_bytes;
}

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_XLA_FFI_DECODE_H_
