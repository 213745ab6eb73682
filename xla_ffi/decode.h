// Operands of XLA FFI calls as views, and checks of who calls and of their sizes: what all
// platforms' handlers share.

#ifndef JAX_SM_FREE_XLA_FFI_DECODE_H_
#define JAX_SM_FREE_XLA_FFI_DECODE_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "cc/config.h"
#include "cc/op.h"
#include "cc/operands.h"
#include "cc/quantized.h"
#include "xla/ffi/api/ffi.h"

namespace jax_sm_free {

namespace ffi = xla::ffi;
using S32 = ffi::Buffer<ffi::S32>;
using F32 = ffi::Buffer<ffi::F32>;
template <typename T>
using Out = ffi::Result<T>;

// Why an op finds no rank to work for.
inline ffi::Error IsClosed(Op op, int64_t buffer_id) {
  return {ffi::ErrorCode::kFailedPrecondition,
          std::string("jax_sm_free: ") + OpName(op) + ": expected buffer " +
              std::to_string(buffer_id) + " to be open, but it is closed"};
}
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

// Python has checked every shape at trace time; this keeps a program that was lowered for another
// configuration (a serialized executable, say) from reading or writing past its memory.
inline ffi::Error CheckSizes(const char* op, const char* what, bool fits, int64_t expected,
                             int64_t seen) {
  if (fits) return ffi::Error::Success();
  return ffi::Error::InvalidArgument(std::string("jax_sm_free: ") + op + ": expected " + what +
                                     " " + std::to_string(expected) + ", seen " +
                                     std::to_string(seen));
}

inline ffi::Error CheckRows(const char* op, const Config& config, int64_t num_tokens,
                            int64_t row_bytes) {
  if (ffi::Error error = CheckSizes(op, "tokens, at most", num_tokens <= config.max_tokens,
                                    config.max_tokens, num_tokens);
      error.failure()) {
    return error;
  }
  return CheckSizes(op, "bytes a row, at most", row_bytes <= config.row_bytes, config.row_bytes,
                    row_bytes);
}

// Bytes that a row of a dispatch travels as.
inline int64_t WireBytes(const std::optional<Matrix>& quantized, int64_t row_bytes) {
  return quantized ? QuantizedRowBytes(*quantized) : row_bytes;
}

// Rows of a dispatch: `row_bytes` of values and scales, where they are, and what they travel as.
inline ffi::Error CheckDispatched(const char* op, const Config& config, int64_t num_tokens,
                                  int64_t row_bytes, const std::optional<Matrix>& quantized) {
  if (!quantized) return CheckRows(op, config, num_tokens, row_bytes);
  const int64_t expected = quantized->row_bytes();
  if (ffi::Error error =
          CheckSizes(op, "rows to quantise of bytes", row_bytes == expected, expected, row_bytes);
      error.failure()) {
    return error;
  }
  return CheckRows(op, config, num_tokens, WireBytes(quantized, row_bytes));
}

inline ffi::Error CheckLayout(const char* op, const Config& config, const S32& rows,
                              int64_t row_bytes) {
  if (ffi::Error error = CheckRows(op, config, 0, row_bytes); error.failure()) return error;
  const int64_t num_rows = rows.dimensions()[0];
  const int64_t expected = config.max_recv_tokens();
  return CheckSizes(op, "token rows in the layout", num_rows == expected, expected, num_rows);
}

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_XLA_FFI_DECODE_H_
