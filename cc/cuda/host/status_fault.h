// Puts into words a fault that a kernel wrote into pinned memory as numbers.

#ifndef JAX_SM_FREE_CC_CUDA_HOST_STATUS_FAULT_H_
#define JAX_SM_FREE_CC_CUDA_HOST_STATUS_FAULT_H_

#include <optional>

#include "cc/cuda/device_state.h"
#include "cc/cuda/rank_view.h"
#include "cc/fault.h"

namespace jax_sm_free::cuda {

// Returns none until a kernel has written all of the record. `waited_s` is how long the kernel has
// waited, if the fault is about a wait.
std::optional<Fault> FaultIn(FaultRecord& record, const RankView& view, double waited_s);

// Whether the fault only follows from the fault of another rank, or from the end of the buffer.
bool IsEcho(const FaultRecord& record);

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_HOST_STATUS_FAULT_H_
