// Every FFI target, and its operands and results, in order: the same on all platforms. What each of
// them is stands beside it in the handlers. jax_sm_free/primitives.py binds them from the other
// side.

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
      .template Arg<ffi::AnyBuffer>()
      .template Arg<F32>()
      .template Arg<S32>()
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
  return std::forward<Binding>(binding)
      .template Arg<F32>()
      .template Arg<S32>()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<F32>();
}

// apply(op, target, signature) for each. A platform has a function <op>Impl for each, and
// BindCall(), its own part of the bindings.
#define SMF_SEND_TARGETS(apply)                                               \
  apply(DispatchSend, "smf_dispatch_send", BindDispatchSend)                  \
      apply(DispatchBackwardSend, "smf_dispatch_backward_send", BindSendSums) \
          apply(CombineSend, "smf_combine_send", BindSendSums)                \
              apply(CombineBackwardSend, "smf_combine_backward_send", BindCombineBackwardSend)
#define SMF_RECEIVE_TARGETS(apply)                                                            \
  apply(DispatchRecv, "smf_dispatch_recv", BindDispatchRecv)                                  \
      apply(DispatchRecvTokens, "smf_dispatch_recv_tokens", BindDispatchRecvTokens)           \
          apply(DispatchBackwardRecv, "smf_dispatch_backward_recv", BindDispatchBackwardRecv) \
              apply(CombineRecv, "smf_combine_recv", BindCombineRecv)                         \
                  apply(CombineBackwardRecv, "smf_combine_backward_recv", BindCombineBackwardRecv)

// k<op>Handler, and its HandlerEntry.
#define SMF_DEFINE_HANDLER(op, target, signature) \
  XLA_FFI_DEFINE_HANDLER(k##op##Handler, op##Impl, signature(BindCall()));
#define SMF_HANDLER_ENTRY(op, target, signature) {target, nullptr, k##op##Handler},

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_XLA_FFI_SIGNATURES_H_
