// Converts operands of XLA FFI calls to the views that ops take, and finds the buffer that a call
// names.

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
#include "cc/op_table.h"
#include "cc/operands.h"
#include "cc/runtime.h"
#include "xla/ffi/api/ffi.h"

namespace jax_sm_free {

namespace ffi = xla::ffi;
using S32 = ffi::Buffer<ffi::S32>;
using F32 = ffi::Buffer<ffi::F32>;
template <typename T>
using Out = ffi::Result<T>;

// The name that a program has for its buffer, in calls that keep no state.
inline constexpr char kBufferAttribute[] = "buffer";
using BufferName = ffi::Attr<std::string_view, kBufferAttribute>;

// Finds the buffer with the name that a program has for it, and the rank of a device. Fails if the
// buffer is not a `B`, and if the device is outside its mesh.
template <typename B, typename Rank>
ffi::Error FindRank(Op op, std::string_view name, int32_t device, std::shared_ptr<B>& buffer,
                    Rank*& rank) {
  const auto refuse = [op](const std::string& expected, const std::string& seen) {
    return ffi::Error(
        ffi::ErrorCode::kFailedPrecondition,
        std::string("jax_sm_free: ") + OpName(op) + ": expected " + expected + ", seen " + seen);
  };
  Result<std::shared_ptr<Buffer>> found = Registry::Get().FindFor(name);
  if (Fault* fault = std::get_if<Fault>(&found)) {
    fault->op = OpName(op);
    return {ffi::ErrorCode::kFailedPrecondition, fault->Describe()};
  }
  buffer = std::dynamic_pointer_cast<B>(std::get<0>(std::move(found)));
  if (buffer == nullptr) return refuse("a buffer of this platform", std::string(name));
  rank = buffer->RankOf(device);
  if (rank != nullptr) return ffi::Error::Success();
  return refuse("a device of the mesh of buffer " + std::to_string(buffer->id()),
                "device " + std::to_string(device));
}

// Bytes of all elements with the same first index.
template <typename B>
int64_t RowBytes(const B& buffer) {
  const auto dims = buffer.dimensions();
  auto bytes = static_cast<int64_t>(ffi::ByteWidth(buffer.element_type()));
  for (size_t i = 1; i < dims.size(); ++i) bytes *= dims[i];
  return bytes;
}

// The element type of rows that are summed; nullopt for a type that can not be summed.
inline std::optional<DType> DTypeOf(ffi::DataType type) {
  switch (type) {
    case ffi::F32:
      return DType::kFloat32;
    case ffi::BF16:
      return DType::kBFloat16;
    case ffi::F16:
      return DType::kFloat16;
    default:
      return std::nullopt;
  }
}

// The element type of `buffer` must have been checked.
inline Matrix MatrixOf(const ffi::AnyBuffer& buffer) {
  return {.dtype = DTypeOf(buffer.element_type()).value(), .hidden = buffer.dimensions()[1]};
}

// What is checked of an operand or a result.
template <typename B>
Given GivenOf(const B& array) {
  const auto dims = array.dimensions();
  return {{dims.begin(), dims.size()}, DTypeOf(array.element_type()), RowBytes(array)};
}
template <typename B>
Given GivenOf(Out<B>& result) {
  return GivenOf(*result);
}

// How `values` travel. Plain rows may have any element type.
inline RowFormat FormatOf(const Config& config, const ffi::AnyBuffer& values) {
  if (config.wire_format == WireFormat::kPlain) return {};
  return {config.wire_format, MatrixOf(values)};
}

// Null for an array without elements, which stands for an absent operand.
template <typename T>
auto* DataOrNull(T& buffer) {
  return buffer.element_count() == 0 ? nullptr : buffer.typed_data();
}

inline const std::byte* BytesOf(const ffi::AnyBuffer& buffer) {
  return static_cast<const std::byte*>(buffer.untyped_data());
}
inline std::byte* BytesOf(Out<ffi::AnyBuffer>& buffer) {
  return static_cast<std::byte*>(buffer->untyped_data());
}

inline ConstRows RowsOf(const ffi::AnyBuffer& values, const ffi::AnyBuffer& scales) {
  return {BytesOf(values), RowBytes(values), BytesOf(scales), RowBytes(scales)};
}
inline MutableRows RowsOf(Out<ffi::AnyBuffer>& values, Out<ffi::AnyBuffer>& scales) {
  return {BytesOf(values), RowBytes(*values), BytesOf(scales), RowBytes(*scales)};
}

inline LayoutOut LayoutResult(Out<S32>& rows, Out<S32>& num_rows_from) {
  return {rows->typed_data(), num_rows_from->typed_data()};
}

// `num_rows` is the number of expert rows, also where `y` is empty.
inline ExpertRows ExpertRowsOf(const ffi::AnyBuffer& y, const float* weights, const S32& rows,
                               const S32& num_rows_from, int64_t num_rows) {
  return {.y = BytesOf(y),
          .weights = weights,
          .layout = {.rows = rows.typed_data(),
                     .num_rows_from = num_rows_from.typed_data(),
                     .fanout = static_cast<int32_t>(rows.dimensions()[1]),
                     .num_rows = num_rows}};
}

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_XLA_FFI_DECODE_H_
