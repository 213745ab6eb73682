// The source side of an exchange: the ranks that each token goes to, and messages with the rows.

#ifndef JAX_SM_FREE_CC_CPU_PACK_H_
#define JAX_SM_FREE_CC_CPU_PACK_H_

#include <cstdint>
#include <vector>

#include "cc/config.h"
#include "cc/cpu/message.h"
#include "cc/fault.h"
#include "cc/operands.h"

namespace jax_sm_free {

// The tokens that a rank sends to each rank, in ascending order. One copy of a token goes to a
// rank, however many of its experts are there.
class Route {
 public:
  // A fault (without op and rank) if an index lies outside [-1, num_experts).
  static Result<Route> Make(const Config& config, const TopK& topk);

  const std::vector<int32_t>& tokens(int32_t rank) const { return tokens_[rank]; }

 private:
  std::vector<std::vector<int32_t>> tokens_;
};

// A message with the rows of `tokens`, without routing: combine_backward.
Message PackRows(const Config& config, Kind kind, const std::vector<int32_t>& tokens,
                 const ConstRows& rows, BlockPool::Block block);

// A message with the rows of `tokens`, and with their routing to the experts of rank `dst`:
// dispatch.
Message PackDispatch(const Config& config, const std::vector<int32_t>& tokens, const TopK& topk,
                     int32_t dst, const ConstRows& rows, BlockPool::Block block);

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_PACK_H_
