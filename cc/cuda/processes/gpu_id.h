// What a GPU is called in all processes.

#ifndef JAX_SM_FREE_CC_CUDA_PROCESSES_GPU_ID_H_
#define JAX_SM_FREE_CC_CUDA_PROCESSES_GPU_ID_H_

#include <array>
#include <optional>

namespace jax_sm_free::cuda {

using GpuId = std::array<char, 16>;  // its UUID

// Null for a device that is not usable.
std::optional<GpuId> GpuIdOf(int device);

// Whether it is a device of this process: CUDA_VISIBLE_DEVICES hides others.
bool IsVisible(const GpuId& id);

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_PROCESSES_GPU_ID_H_
