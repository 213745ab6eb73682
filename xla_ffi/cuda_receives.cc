// Receives on GPUs.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "cc/cuda/kernels/kernels.h"
#include "cc/op.h"
#include "xla/ffi/api/ffi.h"
#include "xla_ffi/cuda_call.h"
#include "xla_ffi/cuda_handlers.h"
#include "xla_ffi/decode.h"
#include "xla_ffi/operand_checks.h"
#include "xla_ffi/signatures.h"

namespace jax_sm_free::cuda {
namespace {

// Takes the dispatch that the token names, whose rows are like these. This rank has `num_own` rows
// of its own beside them.
void WaitForRows(const Call& call, const MutableRows& rows,
                 const std::optional<Matrix>& dequantized, const F32& token, int64_t num_own,
                 bool for_messages, cudaStream_t stream) {
  LaunchWait(call.view(),
             {Op::kDispatchRecv, Kind::kDispatch, WireBytes(dequantized, rows.row_bytes()), nullptr,
              token.typed_data(), for_messages, true, dequantized ? -1 : num_own},
             stream);
}

ffi::Error DispatchRecvImpl(std::string_view buffer, int32_t device, cudaStream_t stream,
                            F32 token,                  // [kTokenSize]
                            ffi::AnyBuffer own_values,  // [T, values columns], what was sent; T is
                            ffi::AnyBuffer own_scales,  // [T, scales columns]  0 for quantised rows
                            Out<ffi::AnyBuffer> values,  // [recv_capacity, values columns]
                            Out<ffi::AnyBuffer> scales,  // [recv_capacity, scales columns]
                            Out<S32> group_sizes,        // [num_local_experts]
                            Out<S32> counts,             // [num_local_experts]
                            Out<F32> weights,            // [recv_capacity]
                            Out<S32> dropped,            // []
                            Out<S32> rows,               // [ep_size * max_tokens, top_k]
                            Out<S32> num_rows_from) {    // [ep_size]
  Call call;
  if (auto error = Locate(Op::kDispatchRecv, buffer, device, call); error.failure()) return error;
  if (auto error = CheckReceivedRows(call.config(), token, own_values, own_scales, values, scales,
                                     call.config().recv_capacity);
      error.failure()) {
    return error;
  }
  if (auto error = CheckReceivedExperts(call.config(), group_sizes, counts, weights, dropped, rows,
                                        num_rows_from);
      error.failure()) {
    return error;
  }
  const std::optional<Matrix> dequantized = QuantizedOf(call.config(), *values);
  const ConstRows own_rows = dequantized ? ConstRows{} : RowsOf(own_values, own_scales);
  const MutableRows unpacked = RowsOf(values, scales);
  const bool all_here =
      !GoInParts(call.config().max_tokens, WireBytes(dequantized, unpacked.row_bytes()));
  const ExpertsOut out{own_rows,
                       unpacked,
                       group_sizes->typed_data(),
                       counts->typed_data(),
                       weights->typed_data(),
                       dropped->typed_data(),
                       rows->typed_data(),
                       num_rows_from->typed_data(),
                       all_here};
  WaitForRows(call, out.rows, dequantized, token, own_values.dimensions()[0], all_here, stream);
  if (dequantized) {
    LaunchUnpackExpertsDequantized(call.view(), out, *dequantized, stream);
  } else {
    LaunchUnpackExperts(call.view(), out, stream);
  }
  return Enqueued(call);
}

ffi::Error DispatchRecvTokensImpl(std::string_view buffer, int32_t device, cudaStream_t stream,
                                  F32 token,                   // [kTokenSize]
                                  ffi::AnyBuffer own_values,   // [T, values columns], as above
                                  ffi::AnyBuffer own_scales,   // [T, scales columns]
                                  Out<ffi::AnyBuffer> values,  // [R, values columns]
                                  Out<ffi::AnyBuffer> scales,  // [R, scales columns]
                                  Out<S32> topk_idx,           // [R, top_k]; R is
                                  Out<F32> topk_weights,       // [R, top_k]  ep_size * max_tokens
                                  Out<S32> counts,             // [num_local_experts]
                                  Out<S32> num_tokens,         // []
                                  Out<S32> rows,               // [R, 1]
                                  Out<S32> num_rows_from) {    // [ep_size]
  Call call;
  if (auto error = Locate(Op::kDispatchRecv, buffer, device, call); error.failure()) return error;
  if (auto error = CheckReceivedRows(call.config(), token, own_values, own_scales, values, scales,
                                     call.config().max_recv_tokens());
      error.failure()) {
    return error;
  }
  if (auto error = CheckReceivedTokens(call.config(), topk_idx, topk_weights, counts, num_tokens,
                                       rows, num_rows_from);
      error.failure()) {
    return error;
  }
  const std::optional<Matrix> dequantized = QuantizedOf(call.config(), *values);
  const ConstRows own_rows = dequantized ? ConstRows{} : RowsOf(own_values, own_scales);
  const TokensOut out{own_rows,
                      RowsOf(values, scales),
                      topk_idx->typed_data(),
                      topk_weights->typed_data(),
                      counts->typed_data(),
                      num_tokens->typed_data(),
                      rows->typed_data(),
                      num_rows_from->typed_data()};
  WaitForRows(call, out.rows, dequantized, token, own_values.dimensions()[0], true, stream);
  if (dequantized) {
    LaunchUnpackTokensDequantized(call.view(), out, *dequantized, stream);
  } else {
    LaunchUnpackTokens(call.view(), out, stream);
  }
  return Enqueued(call);
}

// The sum over ranks; `weight_grads` is null in the forward pass, which has `own` rows.
ffi::Error ReceiveSums(const Call& call, Op op, Kind kind, const float* token, const S32& topk_idx,
                       const std::optional<ExpertRows>& own, Out<ffi::AnyBuffer>& out,
                       float* weight_grads, cudaStream_t stream) {
  const int64_t num_tokens = topk_idx.dimensions()[0];
  const Matrix matrix = MatrixOf(*out);
  const int32_t* idx = topk_idx.typed_data();
  // The routing is found again while the messages are still on their way.
  LaunchRoute(call.view(),
              {{op, kind, nullptr, nullptr}, matrix.row_bytes(), idx, nullptr, num_tokens}, stream);
  LaunchWait(call.view(),
             {op, kind, matrix.row_bytes(), call.view().state->routed_rows, token, true, false, -1},
             stream);
  LaunchSum(call.view(),
            {op, matrix, idx, num_tokens, static_cast<std::byte*>(out->untyped_data()),
             weight_grads, own},
            stream);
  return Enqueued(call);
}

ffi::Error CombineRecvImpl(std::string_view buffer, int32_t device, cudaStream_t stream,
                           F32 token,                  // [kTokenSize]
                           S32 topk_idx,               // [T, top_k]
                           ffi::AnyBuffer y,           // [N, hidden], what was given to the send:
                           F32 weights,                // [N], or [0] for a plain sum
                           S32 rows,                   // [ep_size * max_tokens, fanout]
                           S32 num_rows_from,          // [ep_size]
                           Out<ffi::AnyBuffer> out) {  // [T, hidden]
  Call call;
  if (auto error = Locate(Op::kCombineRecv, buffer, device, call); error.failure()) return error;
  if (auto error =
          CheckCombineRecv(call.config(), token, topk_idx, y, weights, rows, num_rows_from, out);
      error.failure()) {
    return error;
  }
  return ReceiveSums(call, Op::kCombineRecv, Kind::kCombine, token.typed_data(), topk_idx,
                     ExpertRowsOf(y, weights, rows, num_rows_from), out, nullptr, stream);
}

ffi::Error DispatchBackwardRecvImpl(std::string_view buffer, int32_t device, cudaStream_t stream,
                                    F32 token,                   // [kTokenSize]
                                    S32 topk_idx,                // [T, top_k]
                                    Out<ffi::AnyBuffer> x_grad,  // [T, hidden]
                                    Out<F32> weight_grads) {     // [T, top_k]
  Call call;
  if (auto error = Locate(Op::kDispatchBackwardRecv, buffer, device, call); error.failure()) {
    return error;
  }
  if (auto error = CheckDispatchBackwardRecv(call.config(), token, topk_idx, x_grad, weight_grads);
      error.failure()) {
    return error;
  }
  return ReceiveSums(call, Op::kDispatchBackwardRecv, Kind::kDispatchBackward, token.typed_data(),
                     topk_idx, std::nullopt, x_grad, weight_grads->typed_data(), stream);
}

ffi::Error CombineBackwardRecvImpl(std::string_view buffer, int32_t device, cudaStream_t stream,
                                   F32 token,                   // [kTokenSize]
                                   ffi::AnyBuffer y,            // [N, hidden], or [0, hidden]
                                   F32 weights,                 // [N], or [0] for a plain sum
                                   S32 rows,                    // [ep_size * max_tokens, fanout]
                                   S32 num_rows_from,           // [ep_size]
                                   Out<ffi::AnyBuffer> y_grad,  // [N, hidden]
                                   Out<F32> weight_grads) {     // [N], or [0]
  Call call;
  if (auto error = Locate(Op::kCombineBackwardRecv, buffer, device, call); error.failure()) {
    return error;
  }
  if (auto error = CheckCombineBackwardRecv(call.config(), token, y, weights, rows, num_rows_from,
                                            y_grad, weight_grads);
      error.failure()) {
    return error;
  }
  const Matrix matrix = MatrixOf(*y_grad);
  const SpreadArgs args{Op::kCombineBackwardRecv,
                        matrix,
                        LayoutOf(rows, num_rows_from, y_grad->dimensions()[0]),
                        static_cast<const std::byte*>(y.untyped_data()),
                        DataOrNull(weights),
                        static_cast<std::byte*>(y_grad->untyped_data()),
                        weight_grads->typed_data()};
  LaunchWait(call.view(),
             {args.op, Kind::kCombineBackward, matrix.row_bytes(), args.layout.num_rows_from,
              token.typed_data(), true, true, -1},
             stream);
  LaunchSpread(call.view(), args, stream);
  return Enqueued(call);
}

SMF_RECEIVE_TARGETS(SMF_DEFINE_HANDLER)

}  // namespace

std::vector<HandlerEntry> ReceiveHandlers() { return {SMF_RECEIVE_TARGETS(SMF_HANDLER_ENTRY)}; }

}  // namespace jax_sm_free::cuda
