// Transport between the ranks of one process: a message is handed over as it is.

#ifndef JAX_SM_FREE_CC_CPU_IN_PROCESS_H_
#define JAX_SM_FREE_CC_CPU_IN_PROCESS_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "cc/cpu/message.h"
#include "cc/cpu/watchdog.h"
#include "cc/exchange.h"
#include "cc/fault.h"

namespace jax_sm_free {

// The rounds of one group. Thread-safe.
//
// A round is complete for a rank when a message from every rank of the group lies in its inbox.
// A run that failed stays failed: whoever comes late gets the fault that ended it.
class InProcess : public std::enable_shared_from_this<InProcess> {
 public:
  using Arrival = Result<std::vector<Message>>;  // messages by source rank
  using Receiver = std::function<void(Arrival)>;

  // Called once for each run that fails, before any receiver of that run is; never after Close.
  // It must not call back.
  using OnFail = std::function<void(int64_t run, const Fault& fault)>;

  InProcess(int32_t ep_size, double timeout_s, OnFail on_fail)
      : ep_size_(ep_size), timeout_s_(timeout_s), on_fail_(std::move(on_fail)) {}

  // Puts a message into the inbox of `dst`. The run's fault if it has failed.
  std::optional<Fault> Send(const ExchangeKey& key, int32_t src, int32_t dst, Message message);

  // Calls `receiver` once, when the round is complete for `dst` or its run has failed: on this
  // thread if that is so already, else on the worker pool. `op` and `exchange` are for the fault
  // that is raised if the round is not complete within timeout_s.
  void Receive(Op op, const Exchange& exchange, int32_t dst, Receiver receiver);

  // Ends `run` on all ranks of the group with `fault`. A second fault of a run changes nothing.
  void Fail(int64_t run, const Fault& fault);

  // Ends every run that waits, and every one to come.
  void Close(const Fault& fault);

 private:
  struct Inbox {
    std::vector<Message> messages;  // by source rank
    std::vector<bool> arrived;
    int32_t num_arrived = 0;
    Receiver receiver;
    Watchdog::Timer timer;
    bool done = false;
  };
  struct Round {
    std::vector<Inbox> inboxes;  // by destination rank
    int32_t num_done = 0;
  };

  std::optional<Fault> FaultOfRun(int64_t run) const;
  Inbox& FindInbox(const ExchangeKey& key, int32_t dst);
  std::vector<Message> TakeMessages(const ExchangeKey& key, int32_t dst);
  void ArmTimer(Inbox& inbox, Op op, const Exchange& exchange, int32_t dst, double waited);
  void OnTimer(Op op, const Exchange& exchange, int32_t dst, double waited);
  Fault MissingFault(const Inbox& inbox, Op op, const Exchange& exchange, int32_t dst,
                     double waited) const;
  std::vector<Receiver> TakeReceivers(const std::function<bool(int64_t run)>& of_run);

  const int32_t ep_size_;
  const double timeout_s_;
  const OnFail on_fail_;
  mutable std::mutex mutex_;
  std::unordered_map<ExchangeKey, Round, ExchangeKeyHash> rounds_;
  std::map<int64_t, Fault> failed_runs_;
  std::optional<Fault> closed_;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_IN_PROCESS_H_
