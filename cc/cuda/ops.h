// The ops on GPUs: which kernels each op launches, in which order, and which messages go in parts.
// The functions are those of cc/cpu/ops.h, for a rank on a device.
//
// Each function enqueues on the stream of the call and returns. It does not wait, allocate, or read
// what a kernel writes. cudaGetLastError returns an error of a launch.

#ifndef JAX_SM_FREE_CC_CUDA_OPS_H_
#define JAX_SM_FREE_CC_CUDA_OPS_H_

#include <cuda_runtime_api.h>

#include <functional>
#include <optional>

#include "cc/config.h"
#include "cc/cuda/rank_view.h"
#include "cc/op.h"
#include "cc/operands.h"

namespace jax_sm_free::cuda {

// One call of an op by one rank.
struct DeviceCall {
  Op op = Op::kDispatchSend;
  const RankView* view = nullptr;
  cudaStream_t stream = nullptr;
  // Called after the launches of each phase, to measure phases.
  const std::function<void(const char* phase)>* on_phase = nullptr;

  const Config& config() const { return view->config; }
};

// Sends. Each writes its token.

void DispatchSend(const DeviceCall& call, const DispatchSendIn& in, float* token);
void CombineBackwardSend(const DeviceCall& call, const RowsIn& in, float* token);

// combine_send, dispatch_backward_send.
void SendSums(const DeviceCall& call, const SumsIn& in, float* token);

// Forwards, in two tiers. Each writes a token, for the recv.

void DispatchForward(const DeviceCall& call, const float* token, const ForwardOut& out);
void CombineBackwardForward(const DeviceCall& call, const float* token, const ForwardIn& in,
                            float* token_out);

// combine_forward, dispatch_backward_forward.
void ForwardSums(const DeviceCall& call, const float* token, const ForwardIn& in, float* token_out);

// Recvs.

void DispatchRecv(const DeviceCall& call, const float* token, const OwnRows& own,
                  const ExpertsOut& out);
void DispatchRecvTokens(const DeviceCall& call, const float* token, const OwnRows& own,
                        const TokensOut& out);

// combine_recv and dispatch_backward_recv. A combine of one tier has the rows that its send left on
// this rank.
void ReceiveSums(const DeviceCall& call, const float* token, const std::optional<ExpertRows>& own,
                 const SumsOut& out);
void CombineBackwardRecv(const DeviceCall& call, const float* token, const SpreadOut& out);

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_OPS_H_
