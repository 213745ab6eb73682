// Whether all groups of a buffer have sent an exchange, and how long a rank waits for other groups.

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

// A mesh with axes besides those of a buffer has several groups. Their ranks run one program, and
// may meet in collectives of XLA. Such a collective waits until every rank has come, so it waits
// forever if a rank has ended with a fault. Therefore a rank continues behind an exchange only when
// all ranks of all groups have sent it. Then no rank is in a collective behind an exchange that
// another rank may still fail in.
//
// Control flow may separate the groups, for example a condition on the index of another axis. Then
// one group has an exchange that another group never has. This looks as if the other group were
// late. So
//
//   - if a rank of a group has sent, others wait for that group: its other ranks send, too, or time
// out;
//   - if no rank of a group has sent, others wait for it with patience, and then never again at
// this call site. Patience halves with each wait in vain. So all waits for exchanges that never
// come take at most twice kPatienceSeconds in the life of a buffer;
//   - if the group sends that exchange later, it was only late. Then the wait in vain no longer
// counts. This happens once for each call site.
//
// Not thread-safe.
class AllGroups {
 public:
  static constexpr double kPatienceSeconds = 1.0;

  AllGroups(int32_t num_groups, int32_t ep_size, double timeout_s)
      : ep_size_(ep_size), timeout_s_(timeout_s), lost_(num_groups) {}

  // `num` more ranks of `group` have sent all their messages of an exchange. Returns whether all
  // ranks of all groups have sent them now. If so, the exchange is forgotten.
  bool Add(const ExchangeKey& key, int32_t group, int32_t num);

  // A process with ranks of `group` is gone. No rank waits for the group any more.
  void Lose(int32_t group) { lost_[group] = true; }

  // The number of seconds after which a rank asks again, if it has waited `waited_s` for other
  // groups since the messages of its own group came. 0 if the rank is to continue.
  double SecondsToWait(const ExchangeKey& key, double waited_s);

 private:
  struct Site {
    int32_t num_misses = 0;
    std::optional<ExchangeKey>
        missed;  // an exchange that was waited for in vain, and was not sent since
  };

  // How often ranks may wait in vain at a call site.
  static constexpr int32_t kMaxMisses = 2;
  // Bounds the number of exchanges that one group sends and others never send.
  static constexpr size_t kMaxExchanges = 4096;

  void OnSentByAll(const ExchangeKey& key);

  const int32_t ep_size_;
  const double timeout_s_;
  double patience_s_ = kPatienceSeconds;
  std::vector<bool> lost_;                                                           // by group
  std::unordered_map<ExchangeKey, std::vector<int32_t>, ExchangeKeyHash> num_sent_;  // by group
  std::deque<ExchangeKey>
      order_;  // keys in the order in which they came into num_sent_; it has left some of them
  std::unordered_map<int64_t, Site> sites_;  // call sites where ranks waited in vain
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_ALL_GROUPS_H_
