// Functions of the CUDA driver, found at run time: a machine without a GPU has no driver library to
// link against.

#ifndef JAX_SM_FREE_CC_CUDA_DRIVER_H_
#define JAX_SM_FREE_CC_CUDA_DRIVER_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_sm_free::cuda {

// Writes `value` to device memory, of any GPU with peer access, behind all that is on `stream`.
cudaError_t WriteBehind(cudaStream_t stream, uint64_t* address, uint64_t value);

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_DRIVER_H_
