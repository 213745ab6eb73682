// Transport between the ranks of one process: a message is handed over as it is.

#ifndef JAX_SM_FREE_CC_CPU_IN_PROCESS_H_
#define JAX_SM_FREE_CC_CPU_IN_PROCESS_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "cc/cpu/message.h"
#include "cc/cpu/transport.h"
#include "cc/cpu/watchdog.h"
#include "cc/exchange.h"
#include "cc/fault.h"

namespace jax_sm_free {

// The rounds of one group: for each rank of this process an inbox, with room for a message from
// every rank of the group.
class InProcess : public Transport, public std::enable_shared_from_this<InProcess> {
 public:
  // Called once for each run that fails, before any receiver of that run is; never after Close.
  // It must not call back.
  using OnFail = std::function<void(int64_t run, const Fault& fault)>;

  InProcess(int32_t ep_size, double timeout_s, OnFail on_fail)
      : InProcess(ep_size, ep_size, timeout_s, std::move(on_fail)) {}

  // Of the group's ranks, `num_here` receive here; what others send is put in by whoever gets it.
  InProcess(int32_t ep_size, int32_t num_here, double timeout_s, OnFail on_fail)
      : ep_size_(ep_size),
        num_here_(num_here),
        timeout_s_(timeout_s),
        on_fail_(std::move(on_fail)),
        losses_(ep_size) {}

  std::optional<Fault> Begin(Op op, const Exchange& exchange, int32_t rank,
                             std::shared_ptr<const CallSite> site) override;
  std::optional<Fault> Send(const ExchangeKey& key, int32_t src, int32_t dst,
                            Message message) override;
  void Receive(Op op, const Exchange& exchange, int32_t dst, Receiver receiver) override;
  void Fail(int64_t run, const Fault& fault) override;
  void Close(const Fault& fault) override;

  // Nothing more comes from `rank` for runs below `end`: who waits for it, and who will, fails.
  void Lose(int32_t rank, const std::string& reason, int64_t end);

 private:
  struct Inbox {
    std::vector<Message> messages;  // by source rank
    std::vector<bool> arrived;
    int32_t num_arrived = 0;
    Receiver receiver;
    Op op = Op::kDispatchRecv;  // of the receiver
    Exchange exchange;
    Watchdog::Timer timer;
    bool done = false;
  };
  struct Loss {
    int64_t end = std::numeric_limits<int64_t>::min();  // nothing comes for runs below
    std::string reason;
  };
  struct Round {
    std::vector<Inbox> inboxes;  // by destination rank
    int32_t num_done = 0;
  };

  std::optional<Fault> FaultOfRun(int64_t run) const;
  Inbox& FindInbox(const ExchangeKey& key, int32_t dst);
  std::vector<Message> TakeMessages(const ExchangeKey& key, int32_t dst);
  void ArmTimer(Inbox& inbox, int32_t dst, double waited);
  void OnTimer(const ExchangeKey& key, int32_t dst, double waited);
  std::optional<Fault> LossOf(const Inbox& inbox, int32_t dst, int32_t rank) const;
  std::vector<Receiver> TakeReceivers(const std::function<bool(int64_t run)>& of_run);

  const int32_t ep_size_;
  const int32_t num_here_;
  const double timeout_s_;
  const OnFail on_fail_;
  mutable std::mutex mutex_;
  std::unordered_map<ExchangeKey, Round, ExchangeKeyHash> rounds_;
  std::map<int64_t, Fault> failed_runs_;
  std::vector<Loss> losses_;  // by rank
  std::optional<Fault> closed_;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_IN_PROCESS_H_
