#include "cc/cpu/roll_call.h"

#include <algorithm>
#include <cstddef>
#include <sstream>

namespace jax_sm_free {

void RollCall::Hear(int32_t peer) {
  const std::lock_guard lock(mutex_);
  if (!peers_[peer].lost) peers_[peer].heard = true;
  changed_.notify_all();
}

void RollCall::Lose(int32_t peer, const std::string& reason) {
  const std::lock_guard lock(mutex_);
  if (!peers_[peer].heard && !peers_[peer].lost) peers_[peer].lost = reason;
  changed_.notify_all();
}

std::vector<Wire::Unreached> RollCall::Await(std::chrono::duration<double> patience) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, patience, [this] { return AllKnown(); });
  std::ostringstream silent;
  silent << "no answer within " << patience.count() << " s";
  std::vector<Wire::Unreached> unreached;
  for (size_t i = 0; i < peers_.size(); ++i) {
    const auto& [heard, lost] = peers_[i];
    if (heard) continue;
    unreached.push_back({static_cast<int32_t>(i), lost.value_or(silent.str())});
  }
  return unreached;
}

bool RollCall::AllKnown() const {
  return std::ranges::all_of(peers_, [](const Peer& peer) { return peer.heard || peer.lost; });
}

}  // namespace jax_sm_free
