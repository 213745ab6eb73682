// One call of an op on host memory, and the steps that ops have in common.

#ifndef JAX_SM_FREE_CC_CPU_HOST_CALL_H_
#define JAX_SM_FREE_CC_CPU_HOST_CALL_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "cc/config.h"
#include "cc/cpu/call_site.h"
#include "cc/cpu/exchange.h"
#include "cc/cpu/hop.h"
#include "cc/cpu/host_buffer.h"
#include "cc/cpu/message.h"
#include "cc/cpu/parcels.h"
#include "cc/cpu/transport.h"
#include "cc/fault.h"
#include "cc/op.h"

namespace jax_sm_free {

// Called once, when a forward or a recv has ended.
using Done = std::function<void(const std::optional<Fault>& fault)>;

// One call of an op by one rank.
struct HostCall {
  Op op = Op::kDispatchSend;
  std::shared_ptr<HostBuffer> buffer = nullptr;
  HostRank* rank = nullptr;
  int64_t run = 0;

  // For a send.
  int64_t call_site = 0;  // its number within its program
  // The name that processes share; null if all ranks are in this process.
  std::shared_ptr<const CallSite> site = nullptr;

  // For a forward or a recv.
  Done done = nullptr;

  const Config& config() const { return buffer->config(); }
};

// Ends the run on all ranks with a fault of this call. Returns the fault with its op and rank.
Fault Fail(const HostCall& call, int64_t run, Fault fault);

// Sends parcels of one round of an exchange, and counts them. `finishes` is set for the last ones
// that this rank carries in the round.
std::optional<Fault> SendRound(const HostCall& call, ExchangeKey key, Hop hop,
                               const Parcels& parcels, const Transport::Pack& pack, bool finishes);

// Waits for the messages of the round that exchange.key names. Calls `then` with them, by number
// (cc/cpu/hop.h), and `end` when they are gone. Both happen before call.done. A fault of `then`
// ends the run, unless it has an op: then it is the fault with which the run has ended before.
using Then = std::function<std::optional<Fault>(std::vector<Message>& messages)>;
void Await(const HostCall& call, const Exchange& exchange, Then then, std::function<void()> end);

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_HOST_CALL_H_
