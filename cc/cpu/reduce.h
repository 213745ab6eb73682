// Sums of rows: both sides of a combine, and the gradients of dispatch and combine.
//
// All arithmetic is in float32, starts from zero, and has the order that the contract states. A
// result is cast once.

#ifndef JAX_SM_FREE_CC_CPU_REDUCE_H_
#define JAX_SM_FREE_CC_CPU_REDUCE_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "cc/config.h"
#include "cc/cpu/message.h"
#include "cc/fault.h"
#include "cc/operands.h"

namespace jax_sm_free {

// A fault (without op and rank) if `layout` names a row that does not exist, or too many rows.
std::optional<Fault> Check(const Config& config, const LayoutIn& layout);

// One message for each source rank. It has a sum for each token row: the sum over k of weight *
// row.
// weights: f32 [num_rows], or null for a plain sum.
// weight_grads: f32 [ep_size * max_tokens, top_k], which Kind::kDispatchBackward sends, too; else
// null.
std::vector<Message> PackSums(const Config& config, Kind kind, const Matrix& matrix,
                              const std::byte* y, const float* weights, const float* weight_grads,
                              const LayoutIn& layout, BlockPool& pool);

// Rows, one every `stride` bytes.
struct SumRows {
  std::byte* first = nullptr;
  int64_t stride = 0;
};

// out [num_tokens, hidden]: for each token, the sum over ranks of the rows that came back.
// weight_grads: f32 [num_tokens, top_k], read from the messages; or null.
// A fault (without op and rank) if the messages do not fit the tokens.
std::optional<Fault> SumOverRanks(const Config& config, const Matrix& matrix, const TopK& topk,
                                  const std::vector<Message>& messages, const SumRows& out,
                                  float* weight_grads);

// The gradient of PackSums: y_grad [num_rows, hidden], from the gradients of the token rows. If
// weights is null, y_grad is a copy, y is not read and weight_grads is not written.
std::optional<Fault> SpreadGradients(const Config& config, const Matrix& matrix,
                                     const std::vector<Message>& messages, const LayoutIn& layout,
                                     const std::byte* y, const float* weights, std::byte* y_grad,
                                     float* weight_grads);

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_REDUCE_H_
