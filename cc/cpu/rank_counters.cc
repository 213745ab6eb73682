#include "cc/cpu/rank_counters.h"

#include <algorithm>
#include <cstddef>

namespace jax_sm_free {
namespace {

int64_t RowsBytes(const Message& message) {
  return message.header().num_rows * message.header().row_bytes;
}

template <typename Counters>
std::vector<int64_t> Values(const Counters& counters) {
  std::vector<int64_t> values;
  values.reserve(counters.size());
  for (const auto& counter : counters) values.push_back(counter.load(std::memory_order_relaxed));
  return values;
}

}  // namespace

void RankCounters::CountSent(int32_t dst, const Message& message) {
  Add(bytes_sent_[dst], RowsBytes(message));
}

void RankCounters::CountReceived(int32_t source, const Message& message) {
  Add(bytes_received_[source], RowsBytes(message));
}

RankStats RankCounters::Read() const {
  RankStats stats{.rows_dropped = rows_dropped_.load(std::memory_order_relaxed),
                  .bytes_sent = Values(bytes_sent_),
                  .bytes_received = Values(bytes_received_)};
  std::ranges::copy(Values(exchanges_), stats.exchanges.begin());
  return stats;
}

}  // namespace jax_sm_free
