// Index arithmetic of the contract: who owns an expert, how groups are sized, which row is whose.
// Plain functions on integers, so that host and device code share them.

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

// Rows of a group of which `kept` are in use.
constexpr int64_t GroupSize(const Config& config, int64_t kept) {
  return config.expert_capacity > 0 ? config.expert_capacity
                                    : RoundUp(kept, config.expert_alignment);
}

// Rows that `counts` take when every group keeps its first `level` rows, padding included.
constexpr int64_t RowsAtLevel(const int64_t* counts, int32_t num_groups, int64_t level,
                              int64_t alignment) {
  int64_t rows = 0;
  for (int32_t g = 0; g < num_groups; ++g) {
    rows += RoundUp(counts[g] < level ? counts[g] : level, alignment);
  }
  return rows;
}

// The largest level at which the groups fit `capacity`; the largest count where all of them fit.
// Rows grow with the level, so that halving the interval finds it.
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

// Where a rank's expert rows lie, from the number of rows that each source sends to each expert.
class GroupPlan {
 public:
  // rows_per_expert[source] points at i32 [num_local_experts].
  GroupPlan(const Config& config, const std::vector<const int32_t*>& rows_per_expert);

  // The expert row of a source's `position`-th row for an expert, or -1 if it was dropped.
  int64_t Row(int32_t source, int32_t expert, int32_t position) const {
    const int64_t place = base_[source * num_experts_ + expert] + position;
    return place < kept_[expert] ? start_[expert] + place : -1;
  }

  int64_t count(int32_t expert) const { return counts_[expert]; }      // without padding or drops
  int64_t kept(int32_t expert) const { return kept_[expert]; }         // rows that found a place
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
