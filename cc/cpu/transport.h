// How the messages of a buffer get from rank to rank.

#ifndef JAX_SM_FREE_CC_CPU_TRANSPORT_H_
#define JAX_SM_FREE_CC_CPU_TRANSPORT_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
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
// the part of an exchange within one group, and in two tiers one of its two parts: cc/cpu/hop.h. A
// round is complete for a rank when all its messages have come, and all groups have sent theirs:
// see AllGroups. A run that has failed stays failed, for all groups: a rank that comes later gets
// the same fault.
class Transport {
 public:
  // Messages by number. Numbers that do not come have an empty message.
  using Arrival = Result<std::vector<Message>>;
  using Receiver = std::function<void(Arrival)>;
  // The name of a message within its round: its number, and the rank that it is for.
  struct Parcel {
    int32_t number = 0;
    int32_t dst = 0;
  };
  // Makes the message of a parcel.
  using Pack = std::function<Message(const Parcel& parcel)>;

  virtual ~Transport() = default;

  // Called before the sends of `member` in an exchange. `site` is null if all ranks are in one
  // process. Returns the fault of the run, if it has failed or fails now.
  virtual std::optional<Fault> Begin(Op op, const Exchange& exchange, int32_t member,
                                     std::shared_ptr<const CallSite> site) = 0;

  // Puts a message into the inbox of `dst`. `src` is the member of the same group that the message
  // is numbered by. Returns the fault of the run, if it has failed.
  virtual std::optional<Fault> Send(const ExchangeKey& key, int32_t src, int32_t dst,
                                    Message message) = 0;

  // Called after the last message that `member` carries in a round.
  virtual void Finish(const ExchangeKey& key, int32_t member) = 0;

  // Sends the messages that `pack` makes, all of them within the group of `member`, and calls
  // Finish if `finishes` is set.
  virtual std::optional<Fault> SendAll(const ExchangeKey& key, int32_t member,
                                       std::span<const Parcel> parcels, const Pack& pack,
                                       bool finishes) = 0;

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
