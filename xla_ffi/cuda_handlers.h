// XLA FFI handlers of platform "CUDA": decode, check, enqueue the kernels of cc/cuda.

#ifndef JAX_SM_FREE_XLA_FFI_CUDA_HANDLERS_H_
#define JAX_SM_FREE_XLA_FFI_CUDA_HANDLERS_H_

#include <vector>

#include "xla_ffi/handler_entry.h"

namespace jax_sm_free {

std::vector<HandlerEntry> CudaHandlers();

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_XLA_FFI_CUDA_HANDLERS_H_
