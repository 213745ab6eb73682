// What a rank has counted since its buffer was opened. jax_sm_free/stats.py says what the numbers
// mean.

#ifndef JAX_SM_FREE_CC_RANK_STATS_H_
#define JAX_SM_FREE_CC_RANK_STATS_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cc/layout.h"

namespace jax_sm_free {

struct RankStats {
  std::array<int64_t, kNumKinds> exchanges{};  // by Kind
  int64_t rows_dropped = 0;
  // By rank of the group.
  std::vector<int64_t> bytes_sent = {};
  std::vector<int64_t> bytes_received = {};
  std::vector<int64_t> waited_ns = {};
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_RANK_STATS_H_
