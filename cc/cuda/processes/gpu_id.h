// The name of a GPU, the same in all processes.

#ifndef JAX_SM_FREE_CC_CUDA_PROCESSES_GPU_ID_H_
#define JAX_SM_FREE_CC_CUDA_PROCESSES_GPU_ID_H_

#include <array>

namespace jax_sm_free::cuda {

using GpuId = std::array<char, 16>;  // its UUID

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_PROCESSES_GPU_ID_H_
