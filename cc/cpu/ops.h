// The ops on host memory: the steps of each op, in order, from checked operands to a token or
// results.
//
// A fault ends the run on all ranks of all groups. The buffer keeps it for Buffer::TakeFault, and
// the op returns it.

#ifndef JAX_SM_FREE_CC_CPU_OPS_H_
#define JAX_SM_FREE_CC_CPU_OPS_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "cc/cpu/call_site.h"
#include "cc/cpu/host_buffer.h"
#include "cc/cpu/message.h"
#include "cc/fault.h"
#include "cc/op.h"
#include "cc/operands.h"

namespace jax_sm_free {

// Called once, when a recv has ended.
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

  // For a recv.
  Done done = nullptr;

  const Config& config() const { return buffer->config(); }
};

// Sends. Each writes its token unless there is a fault.

// dispatch_send: token rows to the ranks of their experts.
std::optional<Fault> DispatchSend(const HostCall& call, const DispatchSendIn& in, float* token);

// combine_backward_send: the same rows without routing, the gradient of a combine's result.
std::optional<Fault> CombineBackwardSend(const HostCall& call, const RowsIn& in, float* token);

// combine_send, dispatch_backward_send: sums of expert rows back to the ranks of their tokens.
std::optional<Fault> SendSums(const HostCall& call, const SumsIn& in, float* token);

// Recvs. Each waits for the messages of the exchange that `token` names, writes its results, and
// calls call.done. It does so on this thread if all messages are there, else on a worker thread. No
// recv blocks. The rows of this rank come in a message, too, so `own` is not read.

void DispatchRecv(const HostCall& call, const float* token, const OwnRows& own,
                  const ExpertsOut& out);
void DispatchRecvTokens(const HostCall& call, const float* token, const OwnRows& own,
                        const TokensOut& out);

// combine_recv, dispatch_backward_recv.
void ReceiveSums(const HostCall& call, const float* token, const std::optional<ExpertRows>& own,
                 const SumsOut& out);
void CombineBackwardRecv(const HostCall& call, const float* token, const SpreadOut& out);

// The common part of all recvs. `unpack` writes the results.
using Unpack =
    std::function<std::optional<Fault>(const Config& config, const std::vector<Message>& messages)>;
void Receive(const HostCall& call, const float* token, Unpack unpack);

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_OPS_H_
