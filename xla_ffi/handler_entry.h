// The FFI targets of a platform, for the modules that hand them to JAX.

#ifndef JAX_SM_FREE_XLA_FFI_HANDLER_ENTRY_H_
#define JAX_SM_FREE_XLA_FFI_HANDLER_ENTRY_H_

#include <vector>

#include "xla/ffi/api/c_api.h"

namespace jax_sm_free {

struct HandlerEntry {
  const char* target;
  XLA_FFI_Handler* instantiate;  // null where the op keeps no state
  XLA_FFI_Handler* execute;
};

// Every target of platform "cpu", and of platform "CUDA".
std::vector<HandlerEntry> CpuHandlers();
std::vector<HandlerEntry> CudaHandlers();

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_XLA_FFI_HANDLER_ENTRY_H_
