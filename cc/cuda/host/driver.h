// Functions of the CUDA driver, found at run time: a machine without a GPU has no driver library to
// link against.

#ifndef JAX_SM_FREE_CC_CUDA_HOST_DRIVER_H_
#define JAX_SM_FREE_CC_CUDA_HOST_DRIVER_H_

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

namespace jax_sm_free::cuda {

struct Write {
  uint64_t* address;
  uint64_t value;
};

// Enqueues writes, in order, behind all that is on `stream`. An address lies in pinned memory, or
// in device memory of a GPU that this one reaches.
cudaError_t WriteBehind(cudaStream_t stream, const std::array<Write, 2>& writes);

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_HOST_DRIVER_H_
