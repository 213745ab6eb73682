// The inboxes of the ranks of this process, and the receivers that wait for messages in them.

#ifndef JAX_SM_FREE_CC_CPU_INBOXES_H_
#define JAX_SM_FREE_CC_CPU_INBOXES_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cc/config.h"
#include "cc/cpu/all_groups.h"
#include "cc/cpu/exchange.h"
#include "cc/cpu/message.h"
#include "cc/cpu/run_faults.h"
#include "cc/cpu/transport.h"
#include "cc/cpu/wait_counts.h"
#include "cc/cpu/watchdog.h"
#include "cc/fault.h"

namespace jax_sm_free {

// The transport of all groups within a process: it hands a message over without a copy. Each rank
// of this process has an inbox, with room for a message from every rank of its group. A transport
// between processes puts the messages from other processes into these inboxes, too.
class Inboxes : public Transport, public std::enable_shared_from_this<Inboxes> {
 public:
  // Called once for each run that fails, before any receiver of that run. Never called after Close.
  // It must not call back.
  using OnFail = std::function<void(int64_t run, const Fault& fault)>;

  // `num_here` is by group: how many of its ranks are in this process. If some are elsewhere, the
  // owner of this object puts in their messages.
  Inboxes(const Config& config, std::vector<int32_t> num_here, OnFail on_fail);

  // Ranks of one process always give an exchange the same name.
  std::optional<Fault> Begin(Op /*op*/, const Exchange& /*exchange*/, int32_t /*member*/,
                             std::shared_ptr<const CallSite> /*site*/) override {
    return std::nullopt;
  }
  std::optional<Fault> Send(const ExchangeKey& key, int32_t src, int32_t dst,
                            Message message) override;
  void Finish(const ExchangeKey& key, int32_t member) override;
  std::optional<Fault> SendAll(const ExchangeKey& key, int32_t member,
                               std::span<const Parcel> parcels, const Pack& pack,
                               bool finishes) override;
  void Receive(Op op, const Exchange& exchange, int32_t dst, Receiver receiver) override;
  std::vector<int64_t> WaitedNanoseconds(int32_t member) const override;
  void Fail(int64_t run, const Fault& fault) override;
  void Close(const Fault& fault) override;

  // `num` more ranks of `group` have finished their sends.
  void AddFinished(const ExchangeKey& key, int32_t group, int32_t num);

  // No more messages come from `member` for runs below `end`. Every receiver that waits for one
  // fails, and so does every later one.
  void Lose(int32_t member, const std::string& reason, int64_t end);
  static constexpr int64_t kForEver = std::numeric_limits<int64_t>::max();

 private:
  struct Inbox {
    std::vector<Message> messages;  // by number
    std::vector<bool> arrived;
    int32_t num_arrived = 0;
    Receiver receiver;
    Op op = Op::kDispatchRecv;  // of the receiver
    Exchange exchange;
    Watchdog::Timer timer;                       // of the receiver
    Watchdog::Clock::time_point messages_since;  // when it began to wait for messages
    Watchdog::Clock::time_point since;           // when it began to wait for other groups
  };
  struct Loss {
    int64_t end = std::numeric_limits<int64_t>::min();  // no messages come for runs below this one
    std::string reason;
  };
  struct Round {
    std::vector<Inbox> inboxes;  // by destination rank
    int32_t num_done = 0;
    bool waits_for_groups = true;
  };
  using Rounds = std::unordered_map<ExchangeKey, Round, ExchangeKeyHash>;
  // A receiver to call, with its messages or fault, when the lock is released.
  using Delivery = std::pair<Receiver, Arrival>;

  int32_t GroupOf(int32_t member) const { return member / config_.ep_size; }
  int32_t RankOf(int32_t member) const { return member % config_.ep_size; }

  std::optional<Fault> Put(const ExchangeKey& key, int32_t src, int32_t dst, Message message);
  void TakeIfFull(const ExchangeKey& key, int32_t member, std::vector<Delivery>& deliveries);
  void CountFinished(const ExchangeKey& key, int32_t group, int32_t num,
                     std::vector<Delivery>& deliveries);
  Round& FindRound(const ExchangeKey& key, int32_t group);
  Inbox* FindReceiver(const ExchangeKey& key, int32_t member);
  bool IsFull(const ExchangeKey& key, const Inbox& inbox) const {
    return inbox.num_arrived == NumMessages(config_, key.hop);
  }
  // The ranks that have messages for a receiver which have not come, ascending.
  std::vector<int32_t> MissingRanks(const ExchangeKey& key, const Inbox& inbox, int32_t rank) const;
  // Whether the rank that has handed over a message with this number has more for the receiver.
  bool OwesMore(const ExchangeKey& key, const Inbox& inbox, int32_t rank, int32_t number) const;
  void CountWait(const Inbox& inbox, int32_t member, int32_t carrier);
  std::vector<Message> TakeMessages(const ExchangeKey& key, int32_t member);
  void TakeFullInboxes(const ExchangeKey& key, int32_t group, std::vector<Delivery>& deliveries);
  bool MustWaitForGroups(Round& round, const ExchangeKey& key, int32_t member);
  void ArmTimer(Inbox& inbox, int32_t member, double waited);
  void OnTimer(const ExchangeKey& key, int32_t member, double waited);
  void OnGroupsTimer(const ExchangeKey& key, int32_t member);
  // The fault of a receiver that waits for a message of a member that sends no more.
  std::optional<Fault> LossOf(const ExchangeKey& key, const Inbox& inbox, int32_t member) const;
  Fault FaultOfWait(const Inbox& inbox, int32_t member, Fault fault) const;
  std::vector<Delivery> TakeReceivers(const std::function<bool(int64_t run)>& of_run,
                                      const Fault& fault);
  static void Deliver(std::vector<Delivery> deliveries);

  const Config config_;
  const std::vector<int32_t> num_here_;  // by group
  const bool sees_all_ranks_;            // false for one group over several processes
  const OnFail on_fail_;
  mutable std::mutex mutex_;
  AllGroups all_groups_;
  std::vector<Rounds> rounds_;  // by group
  RunFaults run_faults_;
  std::vector<Loss> losses_;  // by member
  WaitCounts waits_;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_INBOXES_H_
