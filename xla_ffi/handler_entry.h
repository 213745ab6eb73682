// The FFI targets of a platform. The extension modules pass them to JAX.

#ifndef JAX_SM_FREE_XLA_FFI_HANDLER_ENTRY_H_
#define JAX_SM_FREE_XLA_FFI_HANDLER_ENTRY_H_

#include <vector>

#include "xla/ffi/api/c_api.h"

namespace jax_sm_free {

struct HandlerEntry {
  const char* target;
  XLA_FFI_Handler* instantiate;  // null for an op without state
  XLA_FFI_Handler* execute;
};

// Every target of platform "cpu", and every target of platform "CUDA".
std::vector<HandlerEntry> CpuHandlers();
std::vector<HandlerEntry> CudaHandlers();

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_XLA_FFI_HANDLER_ENTRY_H_
