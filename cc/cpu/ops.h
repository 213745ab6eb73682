// The ops on host memory: the steps of each op, in order, from checked operands to a token or
// results.
//
// A fault ends the run on all ranks of all groups. The buffer keeps it for Buffer::TakeFault, and
// the op returns it.

#ifndef JAX_SM_FREE_CC_CPU_OPS_H_
#define JAX_SM_FREE_CC_CPU_OPS_H_

#include <functional>
#include <optional>
#include <vector>

#include "cc/cpu/host_call.h"
#include "cc/cpu/message.h"
#include "cc/fault.h"
#include "cc/operands.h"

namespace jax_sm_free {

// Sends. Each writes its token unless there is a fault.

// dispatch_send: token rows to the ranks of their experts.
std::optional<Fault> DispatchSend(const HostCall& call, const DispatchSendIn& in, float* token);

// combine_backward_send: the same rows without routing, the gradient of a combine's result.
std::optional<Fault> CombineBackwardSend(const HostCall& call, const RowsIn& in, float* token);

// combine_send, dispatch_backward_send: sums of expert rows back to the ranks of their tokens.
std::optional<Fault> SendSums(const HostCall& call, const SumsIn& in, float* token);

// Forwards and recvs. Each waits for messages of the exchange that `token` names, writes its
// results, and calls call.done. It does so on this thread if all messages are there, else on a
// worker thread. None of them blocks.

// Forwards: the step between send and recv, in two tiers. Each sends on what has come, and writes
// the token of the exchange, for the recv.

void DispatchForward(const HostCall& call, const float* token, const ForwardOut& out);
void CombineBackwardForward(const HostCall& call, const float* token, const ForwardIn& in,
                            float* token_out);

// combine_forward, dispatch_backward_forward.
void ForwardSums(const HostCall& call, const float* token, const ForwardIn& in, float* token_out);

// Recvs. The rows of this rank come in a message, too, so `own` is not read.

void DispatchRecv(const HostCall& call, const float* token, const OwnRows& own,
                  const ExpertsOut& out);
void DispatchRecvTokens(const HostCall& call, const float* token, const OwnRows& own,
                        const TokensOut& out);

// combine_recv, dispatch_backward_recv.
void ReceiveSums(const HostCall& call, const float* token, const std::optional<ExpertRows>& own,
                 const SumsOut& out);
void CombineBackwardRecv(const HostCall& call, const float* token, const SpreadOut& out);

// The common part of all recvs. `unpack` writes the results. `messages` is by number
// (cc/cpu/hop.h).
using Unpack =
    std::function<std::optional<Fault>(const Config& config, std::vector<Message>& messages)>;
void Receive(const HostCall& call, const float* token, Unpack unpack);

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_OPS_H_
