// The state of a send on platform "cpu": which call of which program it is.

#ifndef JAX_SM_FREE_XLA_FFI_SEND_SITE_H_
#define JAX_SM_FREE_XLA_FFI_SEND_SITE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "cc/cpu/call_site.h"
#include "xla/ffi/api/c_api.h"
#include "xla/ffi/api/ffi.h"

namespace jax_sm_free {

// One call of a send in a compiled program. XLA makes one for each call that is left after all
// inlining, and all devices of the process share it: the same on every rank, as an exchange needs.
// Ranks in other processes need `copy` as well, whose name for it they share.
struct SendSite {
  static xla::ffi::TypeId id;
  static int64_t Next();

  std::string buffer;  // the name that the program has for it
  // XLA keeps the state of a program that runs: so a run finds its buffer, though nobody else may
  // refer to it any more. Null for a buffer that was not open when the program was compiled.
  std::shared_ptr<const void> keeper;
  int64_t number = Next();
  std::unique_ptr<CallCopy> copy;
};

// Makes the state of each send.
XLA_FFI_Handler* MakeSendSiteHandler();

// The type of the state; must be registered before the handlers.
XLA_FFI_TypeId* CallSiteTypeId();
const XLA_FFI_TypeInfo* CallSiteTypeInfo();

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_XLA_FFI_SEND_SITE_H_
