// Index arithmetic of the contract: the rank that owns an expert, the sizes of groups, the row of
// each (token, k). These are plain functions on integers, which host and device code share.

#ifndef JAX_SM_FREE_CC_ROUTING_H_
#define JAX_SM_FREE_CC_ROUTING_H_

#include <cstdint>
#include <vector>

#include "cc/config.h"

namespace jax_sm_free {

constexpr int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

constexpr int32_t OwnerRank(int32_t expert, int32_t num_local_experts) {
  return expert / num_local_experts;
}

constexpr int32_t LocalExpert(int32_t expert, int32_t num_local_experts) {
  return expert % num_local_experts;
}

// Rows of a group in which `kept` rows are used.
constexpr int64_t GroupSize(const Config& config, int64_t kept) {
  return config.expert_capacity > 0 ? config.expert_capacity
                                    : RoundUp(kept, config.expert_alignment);
}

// Rows of all groups, padding included, if each group keeps its first `level` rows.
constexpr int64_t RowsAtLevel(const int64_t* counts, int32_t num_groups, int64_t level,
                              int64_t alignment) {
  int64_t rows = 0;
  for (int32_t g = 0; g < num_groups; ++g) {
    rows += RoundUp(counts[g] < level ? counts[g] : level, alignment);
  }
  return rows;
}

// The largest level at which all groups fit into `capacity`; the largest count if all of them fit
// without a cut. The number of rows grows with the level, so the function halves an interval.
constexpr int64_t CutLevel(const int64_t* counts, int32_t num_groups, int64_t alignment,
                           int64_t capacity) {
  int64_t high = 0;
  for (int32_t g = 0; g < num_groups; ++g) high = counts[g] > high ? counts[g] : high;
  int64_t low = 0;
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (RowsAtLevel(counts, num_groups, middle, alignment) <= capacity) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// The places of a rank's expert rows, computed from the number of rows that each source sends to
// each expert.
class GroupPlan {
 public:
  // rows_per_expert[source] points at i32 [num_local_experts].
  GroupPlan(const Config& config, const std::vector<const int32_t*>& rows_per_expert);

  // The expert row for row number `position` from a source to an expert; -1 if that row was
  // dropped.
  int64_t Row(int32_t source, int32_t expert, int32_t position) const {
    const int64_t place = base_[source * num_experts_ + expert] + position;
    return place < kept_[expert] ? start_[expert] + place : -1;
  }

  int64_t count(int32_t expert) const { return counts_[expert]; }      // without padding or drops
  int64_t kept(int32_t expert) const { return kept_[expert]; }         // rows that were not dropped
  int64_t start(int32_t expert) const { return start_[expert]; }       // first row of the group
  int64_t group_size(int32_t expert) const { return sizes_[expert]; }  // padding included
  int64_t dropped() const { return dropped_; }

 private:
  int32_t num_experts_;
  int64_t dropped_ = 0;
  std::vector<int64_t> counts_, kept_, start_, sizes_;
  std::vector<int64_t> base_;  // [source, expert]: rows of the sources before this one
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_ROUTING_H_
