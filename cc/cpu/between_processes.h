// Transport between ranks of several processes: by hand within a process, by wire to the others.

#ifndef JAX_SM_FREE_CC_CPU_BETWEEN_PROCESSES_H_
#define JAX_SM_FREE_CC_CPU_BETWEEN_PROCESSES_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "cc/config.h"
#include "cc/cpu/block_pool.h"
#include "cc/cpu/in_process.h"
#include "cc/cpu/in_step.h"
#include "cc/cpu/transport.h"
#include "cc/cpu/wire.h"
#include "cc/cpu/wire_note.h"
#include "cc/fault.h"

namespace jax_sm_free {

// The rounds of all groups. Thread-safe.
//
// Messages of other processes are put into the inboxes of this one's ranks as they come. Where
// there are several groups, processes tell each other how many ranks have finished an exchange: see
// AllGroups. The first fault ends the buffer, in all processes: after it, nothing says any more
// that ranks count their runs alike. Each process tells all others of the fault it sees first, or
// is told: so it comes ahead of what the process does next, such as closing. A peer that is gone is
// seen by the wire, one that left out a part of a run by its next run, one that is silent by the
// timeout.
class BetweenProcesses : public Transport, public std::enable_shared_from_this<BetweenProcesses> {
 public:
  struct Place {
    int64_t buffer = 0;
    int32_t process = 0;              // this one
    std::vector<int32_t> process_of;  // by member
    std::vector<BlockPool*> pools;    // by member; null for ranks of others
  };

  // Called once, with the fault that ends the buffer; never after Close.
  using OnEnd = std::function<void(const Fault& fault)>;

  // `wire` has to stay until Close.
  static std::shared_ptr<BetweenProcesses> Make(Place place, const Config& config, Wire* wire,
                                                OnEnd on_end);

  std::optional<Fault> Begin(Op op, const Exchange& exchange, int32_t member,
                             std::shared_ptr<const CallSite> site) override;
  std::optional<Fault> Send(const ExchangeKey& key, int32_t src, int32_t dst,
                            Message message) override;
  void Finish(const ExchangeKey& key, int32_t member) override;
  std::optional<Fault> SendAll(const ExchangeKey& key, int32_t member, const Pack& pack) override;
  void Receive(Op op, const Exchange& exchange, int32_t dst, Receiver receiver) override;
  std::vector<int64_t> WaitedNanoseconds(int32_t member) const override {
    return inboxes_->WaitedNanoseconds(member);
  }
  void Fail(int64_t run, const Fault& fault) override;
  void Close(const Fault& fault) override;

  // What the wire calls back with.
  BlockPool::Block Allocate(const MessageNote& note, int64_t bytes);
  void OnMessage(int32_t process, const MessageNote& note, BlockPool::Block block, int64_t bytes);
  void OnFinished(int32_t process, const FinishedNote& note);
  void OnFault(const Fault& fault) { End(fault, Seen::kElsewhere); }
  void OnLost(int32_t process, const std::string& reason);

 private:
  // Where a fault was seen first.
  enum class Seen { kHere, kElsewhere };

  BetweenProcesses(Place place, const Config& config, Wire* wire, OnEnd on_end);

  bool IsHere(int32_t member) const { return place_.process_of[member] == place_.process; }
  bool IsMember(int32_t member) const {
    return member >= 0 && member < static_cast<int32_t>(place_.process_of.size());
  }
  int32_t GroupOf(int32_t member) const { return member / config_.ep_size; }
  int32_t RankOf(int32_t member) const { return member % config_.ep_size; }
  std::optional<Fault> Accept(const MessageNote& note, Message message);
  void End(const Fault& fault, Seen seen = Seen::kHere);
  // All of it but what waits in the inboxes. Whether this is the first fault.
  bool TellEnd(const Fault& fault, Seen seen);
  void Tell(const WireNote& note);

  const Place place_;
  const Config config_;
  Wire* const wire_;
  const OnEnd on_end_;
  const std::vector<int32_t> num_here_;  // by group: ranks of this process
  const std::set<int32_t> others_;       // all processes but this one
  std::shared_ptr<InProcess> inboxes_;
  std::mutex mutex_;
  std::vector<InStep> in_step_;      // by group
  std::vector<int64_t> latest_run_;  // by member: that it has sent anything of
  // By group: how many ranks of this process have finished, where some have and some have not.
  std::vector<std::unordered_map<ExchangeKey, int32_t, ExchangeKeyHash>> num_finished_;
  std::optional<Fault> ended_;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_BETWEEN_PROCESSES_H_
