#include "cc/cpu/pack.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cc/fault_texts.h"
#include "cc/routing.h"

namespace jax_sm_free {

Result<Route> Route::Make(const Config& config, const TopK& topk) {
  Route route;
  route.tokens_.resize(config.ep_size);
  for (std::vector<int32_t>& tokens : route.tokens_) tokens.reserve(topk.num_tokens);
  const int32_t num_local = config.num_local_experts();
  for (int64_t t = 0; t < topk.num_tokens; ++t) {
    for (int32_t k = 0; k < config.top_k; ++k) {
      const int32_t expert = topk.idx[t * config.top_k + k];
      if (expert == -1) continue;
      if (expert < -1 || expert >= config.num_experts) {
        return IndexOutOfRange(config.num_experts, expert, t, k);
      }
      std::vector<int32_t>& tokens = route.tokens_[OwnerRank(expert, num_local)];
      if (tokens.empty() || tokens.back() != t) tokens.push_back(static_cast<int32_t>(t));
    }
  }
  return route;
}

Message PackRows(const Config& config, Kind kind, const std::vector<int32_t>& tokens,
                 const ConstRows& rows, BlockPool::Block block) {
  Message message(std::move(block), config,
                  {.kind = static_cast<int32_t>(kind),
                   .num_rows = static_cast<int32_t>(tokens.size()),
                   .row_bytes = rows.row_bytes()});
  for (size_t i = 0; i < tokens.size(); ++i) {
    std::byte* out = message.row(static_cast<int64_t>(i));
    std::memcpy(out, rows.values + tokens[i] * rows.values_bytes, rows.values_bytes);
    if (rows.scales_bytes == 0) continue;
    std::memcpy(out + rows.values_bytes, rows.scales + tokens[i] * rows.scales_bytes,
                rows.scales_bytes);
  }
  return message;
}

Message PackDispatch(const Config& config, const std::vector<int32_t>& tokens, const TopK& topk,
                     int32_t dst, const ConstRows& rows, BlockPool::Block block) {
  Message message = PackRows(config, Kind::kDispatch, tokens, rows, std::move(block));
  const int32_t num_local = config.num_local_experts();
  int32_t* rows_per_expert = message.rows_per_expert();
  std::fill_n(rows_per_expert, num_local, 0);
  int64_t entry = 0;
  for (const int32_t t : tokens) {
    for (int32_t k = 0; k < config.top_k; ++k, ++entry) {
      const int64_t source = int64_t{t} * config.top_k + k;
      const int32_t expert = topk.idx[source];
      const bool here = expert >= 0 && OwnerRank(expert, num_local) == dst;
      const int32_t local = here ? LocalExpert(expert, num_local) : -1;
      message.local_expert()[entry] = local;
      message.position()[entry] = here ? rows_per_expert[local]++ : 0;
      message.weight()[entry] = here ? topk.weights[source] : 0.0F;
    }
  }
  return message;
}

}  // namespace jax_sm_free
