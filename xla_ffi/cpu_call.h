// One call of an op by one rank: whose it is, and how it ends.

#ifndef JAX_SM_FREE_XLA_FFI_CPU_CALL_H_
#define JAX_SM_FREE_XLA_FFI_CPU_CALL_H_

#include <cstdint>
#include <optional>
#include <string_view>

#include "cc/cpu/ops.h"
#include "cc/fault.h"
#include "cc/op.h"
#include "xla/ffi/api/ffi.h"

namespace jax_sm_free {

namespace ffi = xla::ffi;

// Finds the buffer of a program's name for it, and the rank of a call.
ffi::Error Locate(Op op, std::string_view name, int32_t device, ffi::RunId run, HostCall& call);

ffi::Error ToError(const std::optional<Fault>& fault);

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_XLA_FFI_CPU_CALL_H_
