// Sums of rows: both sides of a combine, and the gradients of both ops.
//
// All arithmetic is in float32, in the order the contract states, starting from zero; a result is
// cast once.

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

// A fault (without op and rank) if `layout` names what there is not.
std::optional<Fault> Check(const Config& config, const LayoutIn& layout);

// One message per source rank: for each of its token rows, the sum over k of weight * row.
// weights: f32 [num_rows], or null for a plain sum.
// weight_grads: f32 [ep_size * max_tokens, top_k], sent along by Kind::kDispatchBackward, else
// null.
std::vector<Message> PackSums(const Config& config, Kind kind, const Matrix& matrix,
                              const std::byte* y, const float* weights, const float* weight_grads,
                              const LayoutIn& layout, BlockPool& pool);

// out [num_tokens, hidden]: for each token, the sum over ranks of what came back.
// weight_grads: f32 [num_tokens, top_k], written from the messages, or null.
// A fault (without op and rank) if the messages do not fit the tokens.
std::optional<Fault> SumOverRanks(const Config& config, const Matrix& matrix, const TopK& topk,
                                  const std::vector<Message>& messages, std::byte* out,
                                  float* weight_grads);

// The gradient of PackSums: y_grad [num_rows, hidden] from the gradients of its token rows.
// weights null: y_grad is a copy, y is not read and weight_grads is not written.
std::optional<Fault> SpreadGradients(const Config& config, const Matrix& matrix,
                                     const std::vector<Message>& messages, const LayoutIn& layout,
                                     const std::byte* y, const float* weights, std::byte* y_grad,
                                     float* weight_grads);

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_REDUCE_H_
