// Whether all groups of a buffer have sent an exchange, and how long one waits for the others.

#ifndef JAX_SM_FREE_CC_CPU_ALL_GROUPS_H_
#define JAX_SM_FREE_CC_CPU_ALL_GROUPS_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <unordered_map>
#include <vector>

#include "cc/cpu/exchange.h"

namespace jax_sm_free {

// Mesh axes besides a buffer's own make several groups. Their ranks run one program, and may meet
// in XLA's collectives, which wait until every rank has come: for ever, if one has ended with a
// fault. So a rank goes on behind an exchange only once all ranks of all groups have sent it. Then
// nobody is in a collective behind the exchange while a rank may still fail in it.
//
// Control flow may part the groups, a condition on the index of another axis for example. Then an
// exchange of one group never happens in another, which looks as if that group were late. So
//
//   - a group of which a rank has sent is waited for: its other ranks follow, or time out;
//   - a group of which no rank has sent is waited for with patience, and then never again at this
//     call site. Patience halves with each wait in vain, so that all waits for what never comes
//     take at most twice kPatienceSeconds in a buffer's life;
//   - if the group sends that exchange later after all, it was only late: the wait in vain is taken
//     back, once for each call site.
//
// Not thread-safe.
class AllGroups {
 public:
  static constexpr double kPatienceSeconds = 1.0;

  AllGroups(int32_t num_groups, int32_t ep_size, double timeout_s)
      : ep_size_(ep_size), timeout_s_(timeout_s), lost_(num_groups) {}

  // `num` more ranks of `group` have sent all their messages of an exchange. Whether all ranks of
  // all groups have now; the exchange is forgotten then.
  bool Add(const ExchangeKey& key, int32_t group, int32_t num);

  // A process with ranks of `group` is gone: nobody waits for the group any more.
  void Lose(int32_t group) { lost_[group] = true; }

  // After how many seconds to ask again, by a rank that has waited this long for other groups since
  // its own group's messages came; 0 if it is to go on.
  double SecondsToWait(const ExchangeKey& key, double waited_s);

 private:
  struct Site {
    int32_t num_misses = 0;
    std::optional<ExchangeKey> missed;  // waited for in vain, and not sent since
  };

  // How often a call site may be waited for in vain.
  static constexpr int32_t kMaxMisses = 2;
  // Exchanges that one group sends and others never do would pile up.
  static constexpr size_t kMaxExchanges = 4096;

  void OnSentByAll(const ExchangeKey& key);

  const int32_t ep_size_;
  const double timeout_s_;
  double patience_s_ = kPatienceSeconds;
  std::vector<bool> lost_;                                                           // by group
  std::unordered_map<ExchangeKey, std::vector<int32_t>, ExchangeKeyHash> num_sent_;  // by group
  std::deque<ExchangeKey> order_;  // in which they came into num_sent_, and some that left it
  std::unordered_map<int64_t, Site> sites_;  // that were waited for in vain
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_ALL_GROUPS_H_
