// Stand-ins for the handlers of platform "CUDA" in a build without CUDA.

#ifndef JAX_SM_FREE_XLA_FFI_CUDA_STUB_H_
#define JAX_SM_FREE_XLA_FFI_CUDA_STUB_H_

#include <vector>

#include "xla_ffi/handler_entry.h"

namespace jax_sm_free {

// Every target, as a handler that fails and says why. Enough to compile for a GPU without one.
std::vector<HandlerEntry> CudaStubHandlers();

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_XLA_FFI_CUDA_STUB_H_
