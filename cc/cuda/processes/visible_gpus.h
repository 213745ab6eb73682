// Which GPUs this process sees.

#ifndef JAX_SM_FREE_CC_CUDA_PROCESSES_VISIBLE_GPUS_H_
#define JAX_SM_FREE_CC_CUDA_PROCESSES_VISIBLE_GPUS_H_

#include <optional>

#include "cc/cuda/processes/gpu_id.h"
#include "cc/cuda/processes/rendezvous.h"

namespace jax_sm_free::cuda {

// Null for a device that is not usable.
std::optional<GpuId> GpuIdOf(int device);

// Warns if CUDA_VISIBLE_DEVICES hides a GPU of the group, on this host, from this process: CUDA
// then copies to that GPU without copy engines.
void WarnOfHiddenGpus(const Rendezvous& rendezvous);

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_PROCESSES_VISIBLE_GPUS_H_
