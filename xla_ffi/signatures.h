// Operands and results of every FFI target, in order: the same on all platforms. What each of them
// is stands beside it in the handlers. jax_sm_free/primitives.py binds them from the other side.

#ifndef JAX_SM_FREE_XLA_FFI_SIGNATURES_H_
#define JAX_SM_FREE_XLA_FFI_SIGNATURES_H_

#include <utility>

#include "xla/ffi/api/ffi.h"
#include "xla_ffi/decode.h"

namespace jax_sm_free {

// Each adds to a platform's binding, which holds the attribute and contexts that all calls have.

template <typename Binding>
auto BindDispatchSend(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<S32>()
      .template Arg<F32>()
      .template Arg<S32>()
      .template Ret<F32>();
}

template <typename Binding>
auto BindDispatchRecv(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Arg<F32>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<S32>()
      .template Ret<S32>()
      .template Ret<F32>()
      .template Ret<S32>()
      .template Ret<S32>()
      .template Ret<S32>();
}

template <typename Binding>
auto BindDispatchRecvTokens(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Arg<F32>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<S32>()
      .template Ret<F32>()
      .template Ret<S32>()
      .template Ret<S32>()
      .template Ret<S32>()
      .template Ret<S32>();
}

// combine_send and dispatch_backward_send.
template <typename Binding>
auto BindSendSums(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Arg<ffi::AnyBuffer>()
      .template Arg<F32>()
      .template Arg<S32>()
      .template Arg<S32>()
      .template Ret<F32>();
}

template <typename Binding>
auto BindCombineRecv(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Arg<F32>()
      .template Arg<S32>()
      .template Ret<ffi::AnyBuffer>();
}

template <typename Binding>
auto BindCombineBackwardSend(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Arg<ffi::AnyBuffer>()
      .template Arg<S32>()
      .template Ret<F32>();
}

template <typename Binding>
auto BindCombineBackwardRecv(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Arg<F32>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<F32>()
      .template Arg<S32>()
      .template Arg<S32>()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<F32>();
}

template <typename Binding>
auto BindDispatchBackwardRecv(Binding&& binding) {
  return BindCombineRecv(std::forward<Binding>(binding)).template Ret<F32>();
}

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_XLA_FFI_SIGNATURES_H_
