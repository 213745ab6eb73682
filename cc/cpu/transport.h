// How the messages of a buffer get from rank to rank.

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

// Serves the ranks of this process, in all groups. Thread-safe.
//
// A member is a rank of any group: member m is rank m % ep_size of group m / ep_size. A round is
// the part of an exchange within one group. A round is complete for a rank when a message from
// every rank of the group has come to it, and all groups have sent theirs: see AllGroups. A run
// that has failed stays failed, for all groups: a rank that comes later gets the same fault.
class Transport {
 public:
  using Arrival = Result<std::vector<Message>>;  // messages by source rank
  using Receiver = std::function<void(Arrival)>;
  // Makes the message for a rank of the group.
  using Pack = std::function<Message(int32_t rank)>;

  virtual ~Transport() = default;

  // Called before the sends of `member` in an exchange. `site` is null if all ranks are in one
  // process. Returns the fault of the run, if it has failed or fails now.
  virtual std::optional<Fault> Begin(Op op, const Exchange& exchange, int32_t member,
                                     std::shared_ptr<const CallSite> site) = 0;

  // Puts a message into the inbox of `dst`, which is in the same group. Returns the fault of the
  // run, if it has failed.
  virtual std::optional<Fault> Send(const ExchangeKey& key, int32_t src, int32_t dst,
                                    Message message) = 0;

  // Called after the last Send of `member` in an exchange.
  virtual void Finish(const ExchangeKey& key, int32_t member) = 0;

  // Sends the message that `pack` makes to each rank of the group, and calls Finish.
  virtual std::optional<Fault> SendAll(const ExchangeKey& key, int32_t member,
                                       const Pack& pack) = 0;

  // Calls `receiver` once, when the round is complete for `dst` or its run has failed. It does so
  // on this thread if that has happened already, else on the worker pool. If the round is not
  // complete within the timeout, that is a fault, which names `op` and `exchange`.
  virtual void Receive(Op op, const Exchange& exchange, int32_t dst, Receiver receiver) = 0;

  // For each rank of the group, the nanoseconds that receivers of `member` have waited for its
  // messages. Waits that still last are not counted.
  virtual std::vector<int64_t> WaitedNanoseconds(int32_t member) const = 0;

  // Ends `run` on all ranks with `fault`. A second fault of a run changes nothing.
  virtual void Fail(int64_t run, const Fault& fault) = 0;

  // Ends every run that waits, and every later run.
  virtual void Close(const Fault& fault) = 0;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_TRANSPORT_H_
