// What a rank on the host counts of its exchanges.

#ifndef JAX_SM_FREE_CC_CPU_RANK_COUNTERS_H_
#define JAX_SM_FREE_CC_CPU_RANK_COUNTERS_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <vector>

#include "cc/cpu/message.h"
#include "cc/layout.h"
#include "cc/rank_stats.h"

namespace jax_sm_free {

// Thread-safe. A reader may see one of two numbers that are counted together before the other one.
class RankCounters {
 public:
  explicit RankCounters(int32_t ep_size) : bytes_sent_(ep_size), bytes_received_(ep_size) {}

  void CountSent(int32_t dst, const Message& message);
  // Counts an exchange whose messages have all come.
  void CountExchange(Kind kind) { Add(exchanges_[static_cast<size_t>(kind)], 1); }
  void CountReceived(int32_t source, const Message& message);
  void CountDropped(int64_t rows) { Add(rows_dropped_, rows); }

  // All numbers except for how long the rank has waited. The transport knows that.
  RankStats Read() const;

 private:
  using Counter = std::atomic<int64_t>;

  // A counter orders no other memory access.
  static void Add(Counter& counter, int64_t value) {
    counter.fetch_add(value, std::memory_order_relaxed);
  }

  std::array<Counter, kNumKinds> exchanges_{};
  Counter rows_dropped_{0};
  std::vector<Counter> bytes_sent_;  // by rank
  std::vector<Counter> bytes_received_;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_RANK_COUNTERS_H_
