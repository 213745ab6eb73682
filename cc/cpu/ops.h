// The ops on host memory: each one's steps in order, from checked operands to a token or results.
//
// A fault ends the run on all ranks of all groups, is kept for Buffer::TakeFault, and is returned.

#ifndef JAX_SM_FREE_CC_CPU_OPS_H_
#define JAX_SM_FREE_CC_CPU_OPS_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "cc/cpu/call_site.h"
#include "cc/cpu/host_buffer.h"
#include "cc/cpu/message.h"
#include "cc/cpu/pack.h"
#include "cc/cpu/reduce.h"
#include "cc/cpu/unpack.h"
#include "cc/cpu/exchange.h"
#include "cc/fault.h"
#include "cc/op.h"

namespace jax_sm_free {

// One call of an op by one rank.
struct HostCall {
  Op op = Op::kDispatchSend;
  std::shared_ptr<HostBuffer> buffer;
  HostRank* rank = nullptr;
  int64_t run = 0;
  std::shared_ptr<const CallSite> site = nullptr;  // of a send, where processes need it

  const Config& config() const { return buffer->config(); }
};

// Token rows to the ranks of their experts. `call_site` names the send within its program;
// `position` is where the program believes the rank to be in the mesh.
std::optional<Fault> DispatchSend(const HostCall& call, int64_t call_site, int32_t position,
                                  const TopK& topk, const ConstRows& rows, float* token);

// The same, with rows of x quantised on the way.
std::optional<Fault> DispatchSendQuantized(const HostCall& call, int64_t call_site,
                                           int32_t position, const TopK& topk, const Matrix& matrix,
                                           const std::byte* x, float* token);

// The same rows without routing: the gradient of a combine's result.
std::optional<Fault> CombineBackwardSend(const HostCall& call, int64_t call_site, const TopK& topk,
                                         const ConstRows& rows, float* token);

// Operands of a send from experts back to sources; see PackSums.
struct SumOperands {
  Matrix matrix;
  const std::byte* y = nullptr;
  const float* weights = nullptr;
  const float* weight_grads = nullptr;
  LayoutIn layout;
};

// Sums of expert rows back to the ranks of their tokens: combine_send, dispatch_backward_send.
std::optional<Fault> SendSums(const HostCall& call, int64_t call_site, const SumOperands& operands,
                              float* token);

// Waits for the messages of the exchange that `token` names, lets `unpack` read them, and calls
// `done` once: on this thread if they are all there, else on a worker thread. Blocks on nothing.
using Unpack =
    std::function<std::optional<Fault>(const Config& config, const std::vector<Message>& messages)>;
using Done = std::function<void(const std::optional<Fault>& fault)>;
void Receive(const HostCall& call, const float* token, Unpack unpack, Done done);

// UnpackExperts into `out` for Receive, which counts the rows that are dropped.
Unpack UnpackInto(const HostCall& call, const ExpertsOut& out);

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_OPS_H_
