// The transport between ranks of several processes: within a process it hands messages over, and to
// other processes it sends them over a wire.

#ifndef JAX_SM_FREE_CC_CPU_BETWEEN_PROCESSES_H_
#define JAX_SM_FREE_CC_CPU_BETWEEN_PROCESSES_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "cc/config.h"
#include "cc/cpu/block_pool.h"
#include "cc/cpu/in_step.h"
#include "cc/cpu/inboxes.h"
#include "cc/cpu/transport.h"
#include "cc/cpu/wire.h"
#include "cc/cpu/wire_note.h"
#include "cc/fault.h"

namespace jax_sm_free {

// The transport of all groups. Thread-safe.
//
// Messages from other processes are put into the inboxes of the ranks of this process when they
// arrive. If there are several groups, processes tell each other how many ranks have finished an
// exchange: see AllGroups.
//
// The first fault ends the buffer in all processes, because ranks may count their runs differently
// after a fault. Each process tells all others of its first fault, also if another process told it
// of that fault. So the fault arrives before anything that the process does next, such as closing.
// There are three ways to notice a peer that fails: the wire sees that a peer is gone; the next run
// of a peer shows that it has left out a part of a run; a timeout ends the wait for a silent peer.
class BetweenProcesses : public Transport, public std::enable_shared_from_this<BetweenProcesses> {
 public:
  // The ranks of a buffer in all groups, and the processes that they belong to.
  struct Members {
    int64_t buffer = 0;
    int32_t process = 0;              // the number of this process
    std::vector<int32_t> process_of;  // by member
    std::vector<BlockPool*> pools;    // by member; null for ranks of other processes
  };

  // Called once with the fault that ends the buffer. Never called after Close.
  using OnEnd = std::function<void(const Fault& fault)>;

  // `wire` must exist until Close.
  static std::shared_ptr<BetweenProcesses> Make(Members members, const Config& config, Wire* wire,
                                                OnEnd on_end);

  std::optional<Fault> Begin(Op op, const Exchange& exchange, int32_t member,
                             std::shared_ptr<const CallSite> site) override;
  std::optional<Fault> Send(const ExchangeKey& key, int32_t src, int32_t dst,
                            Message message) override;
  void Finish(const ExchangeKey& key, int32_t member) override;
  std::optional<Fault> SendAll(const ExchangeKey& key, int32_t member,
                               std::span<const Parcel> parcels, const Pack& pack,
                               bool finishes) override;
  void Receive(Op op, const Exchange& exchange, int32_t dst, Receiver receiver) override;
  std::vector<int64_t> WaitedNanoseconds(int32_t member) const override {
    return inboxes_->WaitedNanoseconds(member);
  }
  void Fail(int64_t run, const Fault& fault) override;
  void Close(const Fault& fault) override;

  // The callbacks of the wire.
  BlockPool::Block Allocate(const MessageNote& note, int64_t bytes);
  void OnMessage(int32_t process, const MessageNote& note, BlockPool::Block block, int64_t bytes);
  void OnFinished(int32_t process, const FinishedNote& note);
  void OnFault(const Fault& fault) { End(fault, Seen::kElsewhere); }
  void OnLost(int32_t process, const std::string& reason);

 private:
  // The process where a fault was seen first.
  enum class Seen { kHere, kElsewhere };

  BetweenProcesses(Members members, const Config& config, Wire* wire, OnEnd on_end);

  bool IsHere(int32_t member) const { return members_.process_of[member] == members_.process; }
  bool IsMember(int32_t member) const {
    return member >= 0 && member < static_cast<int32_t>(members_.process_of.size());
  }
  int32_t GroupOf(int32_t member) const { return member / config_.ep_size; }
  int32_t RankOf(int32_t member) const { return member % config_.ep_size; }
  // The member that hands over a message.
  int32_t CarrierOf(const MessageNote& note) const;
  std::optional<Fault> Accept(const MessageNote& note, Message message);
  void End(const Fault& fault, Seen seen = Seen::kHere);
  // Does all of End except for ending the waits in the inboxes. Returns whether this is the first
  // fault.
  bool TellEnd(const Fault& fault, Seen seen);
  void Tell(const WireNote& note);

  const Members members_;
  const Config config_;
  Wire* const wire_;
  const OnEnd on_end_;
  const std::vector<int32_t> num_here_;  // by group: ranks of this process
  const std::set<int32_t> others_;       // all processes but this one
  std::shared_ptr<Inboxes> inboxes_;
  std::mutex mutex_;
  std::vector<InStep> in_step_;      // by group
  std::vector<int64_t> latest_run_;  // by member: the latest run of which it has sent anything
  // By group: how many ranks of this process have finished, for exchanges that only some of them
  // have finished.
  std::vector<std::unordered_map<ExchangeKey, int32_t, ExchangeKeyHash>> num_finished_;
  std::optional<Fault> ended_;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_BETWEEN_PROCESSES_H_
