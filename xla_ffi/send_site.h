// The state of a send on platform "cpu": the call of the program that it is.

#ifndef JAX_SM_FREE_XLA_FFI_SEND_SITE_H_
#define JAX_SM_FREE_XLA_FFI_SEND_SITE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "cc/cpu/call_site.h"
#include "xla/ffi/api/c_api.h"
#include "xla/ffi/api/ffi.h"

namespace jax_sm_free {

// A call of a send in a compiled program. XLA makes one for each call that is left after it has
// inlined functions, and all devices of the process share it. So it is the same on every rank, as
// an exchange needs. Ranks of other processes also need `copy`, which has a name that all processes
// share.
struct SendSite {
  static xla::ffi::TypeId id;
  static int64_t Next();

  std::string buffer;  // the name that the program has for it
  // Keeps the buffer as long as the program, so that a run finds its buffer even if nothing else
  // refers to it. XLA keeps this state while the program runs. Null if the buffer was not open when
  // the program was compiled.
  std::shared_ptr<const void> keeper;
  int64_t number = Next();
  std::unique_ptr<CallCopy> copy;
};

// Makes the state of each send.
XLA_FFI_Handler* MakeSendSiteHandler();

// The type of the state. It must be registered before the handlers.
XLA_FFI_TypeId* CallSiteTypeId();
const XLA_FFI_TypeInfo* CallSiteTypeInfo();

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_XLA_FFI_SEND_SITE_H_
