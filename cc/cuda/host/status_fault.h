// The fault that a kernel wrote into pinned memory as numbers, in words.

#ifndef JAX_SM_FREE_CC_CUDA_HOST_STATUS_FAULT_H_
#define JAX_SM_FREE_CC_CUDA_HOST_STATUS_FAULT_H_

#include <optional>

#include "cc/cuda/device_state.h"
#include "cc/fault.h"

namespace jax_sm_free::cuda {

// None until a kernel has written all of it. `waited_s`: how long, if it is about a wait.
std::optional<Fault> FaultIn(FaultRecord& record, const RankView& view, double waited_s);

// Whether the fault only follows from another rank's, or from the buffer's end.
bool IsEcho(const FaultRecord& record);

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_HOST_STATUS_FAULT_H_
