// What a rank does with the messages that it forwards between nodes: cc/tiers.h.

#ifndef JAX_SM_FREE_CC_CPU_FORWARD_H_
#define JAX_SM_FREE_CC_CPU_FORWARD_H_

#include <cstdint>
#include <vector>

#include "cc/config.h"
#include "cc/cpu/message.h"
#include "cc/cpu/reduce.h"
#include "cc/fault.h"
#include "cc/operands.h"

namespace jax_sm_free {

// topk_idx of a rank, with experts numbered by SortedByNode. Numbers that name no expert stay.
std::vector<int32_t> SortByNode(const Config& config, const TopK& topk);

// The routing of the tokens that have an expert on `node`, in their order: node experts, and -1 for
// others. These tokens are the rows of a rail message. A fault (without op and rank) if an index
// lies outside [-1, num_experts).
Result<std::vector<int32_t>> RoutingOnNode(const Config& config, int32_t node, const TopK& topk);

// Writes the routing of a rail message from `node` into node_topk [num_nodes * max_tokens, top_k].
// Null stands for no message.
void WriteNodeTopK(const Config& config, int32_t node, const Message* rail, int32_t* node_topk);

// The routing of the rows of the rail message from `node`: rows of node_topk. A fault (without op
// and rank) if one of these rows names a node expert that does not exist.
Result<TopK> RailRows(const Config& config, int32_t node, const int32_t* node_topk);

// The flat message, from the source of a rail message to the rank with this place. `rows` are the
// rows of the rail message that go there.
Message ForwardDispatch(const Config& config, const Message& rail, const std::vector<int32_t>& rows,
                        int32_t place, BlockPool::Block block);

// The same without routing: combine_backward.
Message ForwardRows(const Config& config, const Message& rail, const std::vector<int32_t>& rows,
                    BlockPool::Block block);

// Which messages of a round are summed: those that the ranks of the node of `rank` have for the
// rank of its rail on `node`.
struct SumsFor {
  int32_t rank = 0;
  int32_t node = 0;
};

// One message with the sums over the ranks of a node. Takes the messages out of those of a round.
// The rows of the message are those of `topk`, which has node experts. A fault (without op and
// rank) if the messages do not fit.
Result<Message> SumWithinNode(const Config& config, const SumsFor& sums, Kind kind,
                              const Matrix& matrix, const TopK& topk,
                              std::vector<Message>& messages, BlockPool::Block block);

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_FORWARD_H_
