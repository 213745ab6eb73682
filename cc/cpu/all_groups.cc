#include "cc/cpu/all_groups.h"

#include <algorithm>

namespace jax_sm_free {

bool AllGroups::Add(const ExchangeKey& key, int32_t group, int32_t num) {
  const auto [entry, is_new] = num_sent_.try_emplace(key, lost_.size());
  if (is_new) order_.push_back(key);
  std::vector<int32_t>& num_sent = entry->second;
  num_sent[group] += num;
  const auto has_sent = [this](int32_t ranks) { return ranks >= ep_size_; };
  const bool by_all = std::ranges::all_of(num_sent, has_sent);
  if (by_all) {
    num_sent_.erase(entry);
    OnSentByAll(key);
  }
  while (!order_.empty() &&
         (order_.size() > kMaxExchanges || !num_sent_.contains(order_.front()))) {
    num_sent_.erase(order_.front());
    order_.pop_front();
  }
  return by_all;
}

void AllGroups::OnSentByAll(const ExchangeKey& key) {
  const auto found = sites_.find(key.call_site);
  if (found == sites_.end() || found->second.missed != key) return;
  if (found->second.num_misses >= kMaxMisses) return;
  found->second.missed.reset();
  patience_s_ = std::min(2 * patience_s_, kPatienceSeconds);
}

double AllGroups::SecondsToWait(const ExchangeKey& key, double waited_s) {
  const auto site = sites_.find(key.call_site);
  if (site != sites_.end() && site->second.missed) return 0;
  const auto entry = num_sent_.find(key);
  bool waits = false;
  bool all_have_begun = true;
  for (size_t group = 0; group < lost_.size(); ++group) {
    const int32_t num_sent = entry == num_sent_.end() ? 0 : entry->second[group];
    if (lost_[group] || num_sent >= ep_size_) continue;
    waits = true;
    all_have_begun = all_have_begun && num_sent > 0;
  }
  if (!waits) return 0;
  // The last ranks of a group may begin one timeout late, and then wait another timeout.
  const double longest = all_have_begun ? 2 * timeout_s_ : patience_s_;
  if (waited_s < longest) return std::min(longest - waited_s, kPatienceSeconds);
  Site& missed = sites_[key.call_site];
  missed.missed = key;
  ++missed.num_misses;
  patience_s_ /= 2;
  return 0;
}

}  // namespace jax_sm_free
