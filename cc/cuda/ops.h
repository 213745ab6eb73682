// The ops on GPUs: which kernels each launches, in which order, and what goes in parts. The same
// functions as those of cc/cpu/ops.h, for a rank on a device.
//
// Each enqueues on the stream of the call and returns; none waits, allocates, or reads what a
// kernel writes. Whether the launches went well, cudaGetLastError says.

#ifndef JAX_SM_FREE_CC_CUDA_OPS_H_
#define JAX_SM_FREE_CC_CUDA_OPS_H_

#include <cuda_runtime_api.h>

#include <functional>
#include <optional>

#include "cc/config.h"
#include "cc/cuda/device_state.h"
#include "cc/op.h"
#include "cc/operands.h"

namespace jax_sm_free::cuda {

// One call of an op by one rank.
struct DeviceCall {
  Op op = Op::kDispatchSend;
  const RankView* view = nullptr;
  cudaStream_t stream = nullptr;
  // Called behind the launches of each phase, for who measures them.
  const std::function<void(const char* phase)>* on_phase = nullptr;

  const Config& config() const { return view->config; }
};

// Sends. Each writes its token.

void DispatchSend(const DeviceCall& call, const DispatchSendIn& in, float* token);
void CombineBackwardSend(const DeviceCall& call, const RowsIn& in, float* token);

// combine_send, dispatch_backward_send.
void SendSums(const DeviceCall& call, const SumsIn& in, float* token);

// Recvs.

void DispatchRecv(const DeviceCall& call, const float* token, const OwnRows& own,
                  const ExpertsOut& out);
void DispatchRecvTokens(const DeviceCall& call, const float* token, const OwnRows& own,
                        const TokensOut& out);

// combine_recv, which has the rows that its send left on this rank; dispatch_backward_recv.
void ReceiveSums(const DeviceCall& call, const float* token, const std::optional<ExpertRows>& own,
                 const SumsOut& out);
void CombineBackwardRecv(const DeviceCall& call, const float* token, const SpreadOut& out);

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_OPS_H_
