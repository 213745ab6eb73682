#include "cc/cpu/forward.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cc/fault_texts.h"
#include "cc/routing.h"
#include "cc/tiers.h"

namespace jax_sm_free {

std::vector<int32_t> SortByNode(const Config& config, const TopK& topk) {
  std::vector<int32_t> sorted(topk.idx, topk.idx + topk.num_tokens * config.top_k);
  for (int32_t& expert : sorted) {
    if (expert >= 0 && expert < config.num_experts) expert = SortedByNode(config, expert);
  }
  return sorted;
}

Result<std::vector<int32_t>> RoutingOnNode(const Config& config, int32_t node, const TopK& topk) {
  const int32_t node_experts = NodeConfig(config).num_experts;
  std::vector<int32_t> routing;
  for (int64_t t = 0; t < topk.num_tokens; ++t) {
    const size_t first = routing.size();
    bool goes_there = false;
    for (int32_t k = 0; k < config.top_k; ++k) {
      const int32_t expert = topk.idx[t * config.top_k + k];
      if (expert < -1 || expert >= config.num_experts) {
        return IndexOutOfRange(config.num_experts, expert, t, k);
      }
      const int32_t sorted = expert < 0 ? -1 : SortedByNode(config, expert);
      const bool there = sorted >= 0 && sorted / node_experts == node;
      goes_there |= there;
      routing.push_back(there ? sorted % node_experts : -1);
    }
    if (!goes_there) routing.resize(first);
  }
  return routing;
}

void WriteNodeTopK(const Config& config, int32_t node, const Message* rail, int32_t* node_topk) {
  const int64_t num_entries = int64_t{config.max_tokens} * config.top_k;
  int32_t* out = node_topk + node * num_entries;
  const int64_t num_used = rail == nullptr ? 0 : int64_t{rail->header().num_rows} * config.top_k;
  if (num_used > 0) std::copy_n(rail->local_expert(), num_used, out);
  std::fill_n(out + num_used, num_entries - num_used, -1);
}

Result<TopK> RailRows(const Config& config, int32_t node, const int32_t* node_topk) {
  const int32_t num_experts = NodeConfig(config).num_experts;
  const int64_t top_k = config.top_k;
  const int64_t first_row = int64_t{node} * config.max_tokens;
  const int32_t* first = node_topk + first_row * top_k;
  for (int64_t row = 0; row < config.max_tokens; ++row) {
    bool is_used = false;
    for (int64_t k = 0; k < top_k; ++k) {
      const int32_t expert = first[row * top_k + k];
      if (expert < -1 || expert >= num_experts) {
        return NodeTopKDiffers(num_experts, expert, first_row + row, k);
      }
      is_used |= expert >= 0;
    }
    if (!is_used) return TopK{.idx = first, .weights = nullptr, .num_tokens = row};
  }
  return TopK{.idx = first, .weights = nullptr, .num_tokens = config.max_tokens};
}

Message ForwardRows(const Config& config, const Message& rail, const std::vector<int32_t>& rows,
                    BlockPool::Block block) {
  Message message(std::move(block), config,
                  {.kind = rail.header().kind,
                   .num_rows = static_cast<int32_t>(rows.size()),
                   .row_bytes = rail.header().row_bytes});
  for (size_t i = 0; i < rows.size(); ++i) {
    std::memcpy(message.row(static_cast<int64_t>(i)), rail.row(rows[i]), rail.header().row_bytes);
  }
  return message;
}

Message ForwardDispatch(const Config& config, const Message& rail, const std::vector<int32_t>& rows,
                        int32_t place, BlockPool::Block block) {
  Message message = ForwardRows(config, rail, rows, std::move(block));
  const int32_t num_local = config.num_local_experts();
  std::copy_n(rail.rows_per_expert() + int64_t{place} * num_local, num_local,
              message.rows_per_expert());
  int64_t entry = 0;
  for (const int32_t row : rows) {
    for (int32_t k = 0; k < config.top_k; ++k, ++entry) {
      const int64_t source = int64_t{row} * config.top_k + k;
      const int32_t expert = rail.local_expert()[source];
      const bool here = expert >= 0 && OwnerRank(expert, num_local) == place;
      message.local_expert()[entry] = here ? LocalExpert(expert, num_local) : -1;
      message.position()[entry] = here ? rail.position()[source] : 0;
      message.weight()[entry] = here ? rail.weight()[source] : 0.0F;
    }
  }
  return message;
}

Result<Message> SumWithinNode(const Config& config, const SumsFor& sums, Kind kind,
                              const Matrix& matrix, const TopK& topk,
                              std::vector<Message>& messages, BlockPool::Block block) {
  std::vector<Message> by_place;
  by_place.reserve(config.node_size());
  for (int32_t place = 0; place < config.node_size(); ++place) {
    by_place.push_back(std::move(messages[RankAt(config, sums.node, place)]));
  }
  Message message(std::move(block), config,
                  {.kind = static_cast<int32_t>(kind),
                   .num_rows = static_cast<int32_t>(topk.num_tokens),
                   .row_bytes = matrix.row_bytes()});
  const SumRows out{message.row(0), message.row(1) - message.row(0)};
  float* weight_grads = kind == Kind::kDispatchBackward ? message.weight() : nullptr;
  auto fault = SumOverRanks(NodeConfig(config), matrix, topk, by_place, out, weight_grads);
  if (!fault) return message;
  if (fault->peer >= 0) fault->peer = RankAt(config, NodeOf(config, sums.rank), fault->peer);
  return *std::move(fault);
}

}  // namespace jax_sm_free
