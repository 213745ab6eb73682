// Converts the rows of a dispatch to and from the format in which they travel: cc/wire_format.h.

#ifndef JAX_SM_FREE_CC_CPU_WIRE_ROWS_H_
#define JAX_SM_FREE_CC_CPU_WIRE_ROWS_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "cc/operands.h"

namespace jax_sm_free {

// The rows of a program as they travel. A plain format leaves the rows where they are; other
// formats make a quantised copy.
class WireRows {
 public:
  // `rows` must outlive this object.
  WireRows(const RowFormat& format, const ConstRows& rows, int64_t num_rows);

  const ConstRows& rows() const { return rows_; }

 private:
  std::unique_ptr<std::byte[]> values_;  // [num_rows, hidden]; null for plain rows
  std::unique_ptr<std::byte[]> scales_;  // [num_rows, NumScales(hidden)]; null for plain rows
  ConstRows rows_;
};

// Converts a row that has travelled, and writes it as row `row` of `out`.
void PutRow(const RowFormat& format, const std::byte* wire, const MutableRows& out, int64_t row);

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_WIRE_ROWS_H_
