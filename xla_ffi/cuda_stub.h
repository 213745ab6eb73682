// Handlers of platform "CUDA" for a build without CUDA.

#ifndef JAX_SM_FREE_XLA_FFI_CUDA_STUB_H_
#define JAX_SM_FREE_XLA_FFI_CUDA_STUB_H_

#include <vector>

#include "xla_ffi/handler_entry.h"

namespace jax_sm_free {

// Each of them fails and says why. They suffice to compile a program for a GPU on a machine without
// one.
std::vector<HandlerEntry> CudaStubHandlers();

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_XLA_FFI_CUDA_STUB_H_
