#include "cc/routing.h"

#include <algorithm>

namespace jax_sm_free {

GroupPlan::GroupPlan(const Config& config, const std::vector<const int32_t*>& rows_per_expert)
    : num_experts_(config.num_local_experts()),
      counts_(num_experts_),
      kept_(num_experts_),
      start_(num_experts_),
      sizes_(num_experts_),
      base_(rows_per_expert.size() * num_experts_) {
  for (size_t source = 0; source < rows_per_expert.size(); ++source) {
    for (int32_t e = 0; e < num_experts_; ++e) {
      base_[source * num_experts_ + e] = counts_[e];
      counts_[e] += rows_per_expert[source][e];
    }
  }
  const int64_t level =
      config.expert_capacity > 0
          ? config.expert_capacity
          : CutLevel(counts_.data(), num_experts_, config.expert_alignment, config.recv_capacity);
  int64_t next = 0;
  for (int32_t e = 0; e < num_experts_; ++e) {
    kept_[e] = std::min(counts_[e], level);
    dropped_ += counts_[e] - kept_[e];
    start_[e] = next;
    sizes_[e] = GroupSize(config, kept_[e]);
    next += sizes_[e];
  }
}

}  // namespace jax_sm_free
