// Rows to and from the form that they have on a float8 wire: cc/quantized.h.

#ifndef JAX_SM_FREE_CC_CPU_QUANTIZE_H_
#define JAX_SM_FREE_CC_CPU_QUANTIZE_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "cc/operands.h"

namespace jax_sm_free {

// A quantised copy of `num_rows` rows.
class QuantizedRows {
 public:
  QuantizedRows(const Matrix& matrix, const std::byte* x, int64_t num_rows);

  ConstRows rows() const;

 private:
  int64_t hidden_;
  std::unique_ptr<uint8_t[]> values_;  // [num_rows, hidden]
  std::unique_ptr<float[]> scales_;    // [num_rows, NumScales(hidden)]
};

// One row as it travels, back to what `matrix` says.
void DequantizeRow(const Matrix& matrix, const std::byte* wire, std::byte* out);

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_QUANTIZE_H_
