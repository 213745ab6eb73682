// A list of FFI targets, for the modules that hand them to JAX.

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

inline std::vector<HandlerEntry> Joined(std::vector<HandlerEntry> entries,
                                        const std::vector<HandlerEntry>& more) {
  entries.insert(entries.end(), more.begin(), more.end());
  return entries;
}

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_XLA_FFI_HANDLER_ENTRY_H_
