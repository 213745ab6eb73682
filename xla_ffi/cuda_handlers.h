// XLA FFI handlers of platform "CUDA": decode, check, enqueue the kernels of cc/cuda.

#ifndef JAX_SM_FREE_XLA_FFI_CUDA_HANDLERS_H_
#define JAX_SM_FREE_XLA_FFI_CUDA_HANDLERS_H_

#include <vector>

#include "xla_ffi/handler_entry.h"

namespace jax_sm_free {
namespace cuda {

std::vector<HandlerEntry> SendHandlers();
std::vector<HandlerEntry> ReceiveHandlers();

}  // namespace cuda

// Every target of this platform.
inline std::vector<HandlerEntry> CudaHandlers() {
  return Joined(cuda::SendHandlers(), cuda::ReceiveHandlers());
}

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_XLA_FFI_CUDA_HANDLERS_H_
