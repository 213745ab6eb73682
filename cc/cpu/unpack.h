// Destination side of a dispatch: rows out of messages into expert groups, or token by token.

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

// With R = ep_size * max_tokens. Token rows are numbered by source rank, then source token.
struct LayoutOut {
  int32_t* rows = nullptr;           // [R, fanout]: expert rows of each token row; -1 for none
  int32_t* num_rows_from = nullptr;  // [ep_size]
};

// `dequantized`: what the rows are where the wire quantises them; they have no scales then.
struct ExpertsOut {
  MutableRows rows;  // [recv_capacity]
  std::optional<Matrix> dequantized = {};
  int32_t* group_sizes = nullptr;  // [num_local_experts]
  int32_t* counts = nullptr;       // [num_local_experts]
  float* weights = nullptr;        // [recv_capacity]
  int32_t* dropped = nullptr;      // []
  LayoutOut layout;                // fanout is top_k
};

struct TokensOut {
  MutableRows rows;  // [R]
  std::optional<Matrix> dequantized = {};
  int32_t* topk_idx = nullptr;    // [R, top_k]
  float* topk_weights = nullptr;  // [R, top_k]
  int32_t* counts = nullptr;      // [num_local_experts]
  int32_t* num_tokens = nullptr;  // []
  LayoutOut layout;               // fanout is 1
};

// `messages` by source rank. Every element of `out` is written, unless there is a fault (without op
// and rank): rows that do not travel as wide as those of `out` do.
std::optional<Fault> UnpackExperts(const Config& config, const std::vector<Message>& messages,
                                   const ExpertsOut& out);
std::optional<Fault> UnpackTokens(const Config& config, const std::vector<Message>& messages,
                                  const TokensOut& out);

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_UNPACK_H_
