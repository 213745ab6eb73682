// How the messages of a buffer's rounds get from rank to rank.

#ifndef JAX_SM_FREE_CC_CPU_TRANSPORT_H_
#define JAX_SM_FREE_CC_CPU_TRANSPORT_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "cc/cpu/call_site.h"
#include "cc/cpu/exchange.h"
#include "cc/cpu/message.h"
#include "cc/fault.h"
#include "cc/op.h"

namespace jax_sm_free {

// For the ranks of this process, of all groups. Thread-safe.
//
// A member is a rank by its number among those of all groups: member m is rank m % ep_size of group
// m / ep_size. A round is one group's part of an exchange. It is complete for a rank when a message
// from every rank of the group has come to it, and when all groups have sent theirs: see AllGroups.
// A run that failed stays failed, for all groups: whoever comes late gets the fault that ended it.
class Transport {
 public:
  using Arrival = Result<std::vector<Message>>;  // messages by source rank
  using Receiver = std::function<void(Arrival)>;
  // Makes the message for a rank of the group.
  using Pack = std::function<Message(int32_t rank)>;

  virtual ~Transport() = default;

  // Before the sends of `member` in an exchange. `site`: null where all ranks are in one process.
  // The run's fault if it has failed, or fails by this.
  virtual std::optional<Fault> Begin(Op op, const Exchange& exchange, int32_t member,
                                     std::shared_ptr<const CallSite> site) = 0;

  // Puts a message into the inbox of `dst`, of the same group. The run's fault if it has failed.
  virtual std::optional<Fault> Send(const ExchangeKey& key, int32_t src, int32_t dst,
                                    Message message) = 0;

  // After the last of them.
  virtual void Finish(const ExchangeKey& key, int32_t member) = 0;

  // All of a member's sends in an exchange, each of what `pack` makes for the rank, and Finish.
  virtual std::optional<Fault> SendAll(const ExchangeKey& key, int32_t member,
                                       const Pack& pack) = 0;

  // Calls `receiver` once, when the round is complete for `dst` or its run has failed: on this
  // thread if that is so already, else on the worker pool. `op` and `exchange` are for the fault
  // that is raised if the round is not complete within the timeout.
  virtual void Receive(Op op, const Exchange& exchange, int32_t dst, Receiver receiver) = 0;

  // By rank of its group: the nanoseconds that receivers of `member` have waited for its messages.
  // What they still wait for is not in it.
  virtual std::vector<int64_t> WaitedNanoseconds(int32_t member) const = 0;

  // Ends `run` on all ranks with `fault`. A second fault of a run changes nothing.
  virtual void Fail(int64_t run, const Fault& fault) = 0;

  // Ends every run that waits, and every one to come.
  virtual void Close(const Fault& fault) = 0;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_TRANSPORT_H_
