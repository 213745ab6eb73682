// Views of the arrays that ops read and write: pointers into the caller's memory, and their shapes.

#ifndef JAX_SM_FREE_CC_OPERANDS_H_
#define JAX_SM_FREE_CC_OPERANDS_H_

#include <cstddef>
#include <cstdint>

namespace jax_sm_free {

// Element types of rows that are summed.
enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

// Rows in two parts, side by side on the wire: values and, for quantised rows, their scales.
// scales_bytes is 0 where there are none.
template <typename Byte>
struct RowParts {
  Byte* values = nullptr;
  int64_t values_bytes = 0;
  Byte* scales = nullptr;
  int64_t scales_bytes = 0;

  constexpr int64_t row_bytes() const { return values_bytes + scales_bytes; }
};
using ConstRows = RowParts<const std::byte>;
using MutableRows = RowParts<std::byte>;

// i32 [num_tokens, top_k], row-major, and f32 of the same shape.
struct TopK {
  const int32_t* idx = nullptr;
  const float* weights = nullptr;  // null where the exchange does not carry them
  int64_t num_tokens = 0;
};

// Rows of `hidden` elements.
struct Matrix {
  DType dtype = DType::kFloat32;
  int64_t hidden = 0;

  constexpr int64_t row_bytes() const {
    return hidden * (dtype == DType::kFloat32 ? int64_t{4} : int64_t{2});
  }
};

// What the dispatch said about its token rows: the contract of jax_sm_free.results.Layout.
struct LayoutIn {
  const int32_t* rows = nullptr;           // [ep_size * max_tokens, fanout]
  const int32_t* num_rows_from = nullptr;  // [ep_size]
  int32_t fanout = 1;
  int64_t num_rows = 0;  // rows that `rows` may name: the first dimension of y
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_OPERANDS_H_
