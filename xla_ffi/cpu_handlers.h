// XLA FFI handlers of platform "cpu": decode, check, call cc/cpu/ops, convert.

#ifndef JAX_SM_FREE_XLA_FFI_CPU_HANDLERS_H_
#define JAX_SM_FREE_XLA_FFI_CPU_HANDLERS_H_

#include <vector>

#include "xla_ffi/handler_entry.h"

namespace jax_sm_free {

std::vector<HandlerEntry> CpuSendHandlers();
std::vector<HandlerEntry> CpuReceiveHandlers();

// Every target of this platform.
inline std::vector<HandlerEntry> CpuHandlers() {
  return Joined(CpuSendHandlers(), CpuReceiveHandlers());
}

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_XLA_FFI_CPU_HANDLERS_H_
