// The destination side of a dispatch: rows from messages into groups of experts, or token by token.

#ifndef JAX_SM_FREE_CC_CPU_UNPACK_H_
#define JAX_SM_FREE_CC_CPU_UNPACK_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "cc/config.h"
#include "cc/cpu/message.h"
#include "cc/fault.h"
#include "cc/operands.h"

namespace jax_sm_free {

// `messages` is by source rank. Writes every element of `out`, unless there is a fault (without op
// and rank): the rows of a message do not have the width of those of `out`.
std::optional<Fault> UnpackExperts(const Config& config, const std::vector<Message>& messages,
                                   const ExpertsOut& out);
std::optional<Fault> UnpackTokens(const Config& config, const std::vector<Message>& messages,
                                  const TokensOut& out);

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_UNPACK_H_
