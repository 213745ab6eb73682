// Checks of every operand and result of a call against the buffer that the call found.
//
// Python checks at trace time what users pass. What gets here may also be a program that was made
// by hand, or changed since: nothing of it may make a handler read or write past an array. All
// platforms check the same things in the same order.

#ifndef JAX_SM_FREE_XLA_FFI_OPERAND_CHECKS_H_
#define JAX_SM_FREE_XLA_FFI_OPERAND_CHECKS_H_

#include "cc/config.h"
#include "cc/op.h"
#include "xla/ffi/api/ffi.h"
#include "xla_ffi/decode.h"

namespace jax_sm_free {

// With R = ep_size * max_tokens, C = recv_capacity, L = num_local_experts and T <= max_tokens.

ffi::Error CheckDispatchSend(const Config& config,
                             const ffi::AnyBuffer& values,  // [T, values columns]
                             const ffi::AnyBuffer& scales,  // [T, scales columns]
                             const S32& topk_idx,           // [T, top_k]
                             const F32& topk_weights,       // [T, top_k]
                             const S32& position,           // []
                             Out<F32>& token);              // [kTokenSize]

// What a dispatch's recv has in both forms. Own rows are those of its send, or none.
ffi::Error CheckReceivedRows(const Config& config,
                             const F32& token,                  // [kTokenSize]
                             const ffi::AnyBuffer& own_values,  // [T or 0, values columns]
                             const ffi::AnyBuffer& own_scales,  // [T or 0, scales columns]
                             Out<ffi::AnyBuffer>& values,       // [num_rows, values columns]
                             Out<ffi::AnyBuffer>& scales,       // [num_rows, scales columns]
                             int64_t num_rows);

ffi::Error CheckReceivedExperts(const Config& config,
                                Out<S32>& group_sizes,     // [L]
                                Out<S32>& counts,          // [L]
                                Out<F32>& weights,         // [C]
                                Out<S32>& dropped,         // []
                                Out<S32>& rows,            // [R, top_k]
                                Out<S32>& num_rows_from);  // [ep_size]

ffi::Error CheckReceivedTokens(const Config& config,
                               Out<S32>& topk_idx,        // [R, top_k]
                               Out<F32>& topk_weights,    // [R, top_k]
                               Out<S32>& counts,          // [L]
                               Out<S32>& num_tokens,      // []
                               Out<S32>& rows,            // [R, 1]
                               Out<S32>& num_rows_from);  // [ep_size]

// combine_send.
ffi::Error CheckCombineSend(const Config& config,
                            const ffi::AnyBuffer& y,   // [N, hidden]
                            const F32& weights,        // [N] or [0]
                            const S32& rows,           // [R, 1 or top_k]
                            const S32& num_rows_from,  // [ep_size]
                            Out<F32>& token);          // [kTokenSize]

ffi::Error CheckDispatchBackwardSend(const Config& config,
                                     const ffi::AnyBuffer& x_grad,  // [N, hidden]
                                     const F32& weight_grads,       // [R, top_k]
                                     const S32& rows,               // [R, 1 or top_k]
                                     const S32& num_rows_from,      // [ep_size]
                                     Out<F32>& token);              // [kTokenSize]

ffi::Error CheckCombineBackwardSend(const Config& config,
                                    const ffi::AnyBuffer& out_grad,  // [T, hidden]
                                    const S32& topk_idx,             // [T, top_k]
                                    Out<F32>& token);                // [kTokenSize]

ffi::Error CheckCombineRecv(const Config& config,
                            const F32& token,           // [kTokenSize]
                            const S32& topk_idx,        // [T, top_k]
                            const ffi::AnyBuffer& y,    // [N, hidden], as for its send
                            const F32& weights,         // [N] or [0]
                            const S32& rows,            // [R, 1 or top_k]
                            const S32& num_rows_from,   // [ep_size]
                            Out<ffi::AnyBuffer>& out);  // [T, hidden]

ffi::Error CheckDispatchBackwardRecv(const Config& config,
                                     const F32& token,             // [kTokenSize]
                                     const S32& topk_idx,          // [T, top_k]
                                     Out<ffi::AnyBuffer>& x_grad,  // [T, columns]
                                     Out<F32>& weight_grads);      // [T, top_k]

ffi::Error CheckCombineBackwardRecv(const Config& config,
                                    const F32& token,             // [kTokenSize]
                                    const ffi::AnyBuffer& y,      // [N, hidden] or [0, hidden]
                                    const F32& weights,           // [N] or [0], as y
                                    const S32& rows,              // [R, 1 or top_k]
                                    const S32& num_rows_from,     // [ep_size]
                                    Out<ffi::AnyBuffer>& y_grad,  // [N, hidden]
                                    Out<F32>& weight_grads);      // [N] or [0], as weights

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_XLA_FFI_OPERAND_CHECKS_H_
