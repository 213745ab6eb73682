// Sends on GPUs.

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

// Orders for this rank's mover will come soon.
void WakeMover(const Call& call) { call.rank->mover->Wake(); }

ffi::Error DispatchSendImpl(std::string_view buffer, int32_t device, cudaStream_t stream,
                            ffi::AnyBuffer values,  // [T, values columns]
                            ffi::AnyBuffer scales,  // [T, scales columns], 0 columns if none
                            S32 topk_idx,           // [T, top_k]
                            F32 topk_weights,       // [T, top_k]
                            S32 position,           // [], in the mesh
                            Out<F32> token) {       // [kTokenSize]
  Call call;
  if (auto error = Locate(Op::kDispatchSend, buffer, device, call); error.failure()) return error;
  if (auto error =
          CheckDispatchSend(call.config(), values, scales, topk_idx, topk_weights, position, token);
      error.failure()) {
    return error;
  }
  const ConstRows rows = RowsOf(values, scales);
  const std::optional<Matrix> quantized = QuantizedOf(call.config(), values);
  const int64_t num_tokens = topk_idx.dimensions()[0];
  WakeMover(call);
  LaunchRoute(call.view(),
              {{Op::kDispatchSend, Kind::kDispatch, position.typed_data(), token->typed_data()},
               WireBytes(quantized, rows.row_bytes()),
               topk_idx.typed_data(),
               topk_weights.typed_data(),
               num_tokens},
              stream);
  if (quantized) {
    LaunchPackQuantized(call.view(), {*quantized, rows.values, num_tokens}, stream);
  } else {
    LaunchPack(call.view(), {rows, num_tokens, true}, stream);
  }
  return Enqueued(call);
}

ffi::Error CombineBackwardSendImpl(std::string_view buffer, int32_t device, cudaStream_t stream,
                                   ffi::AnyBuffer out_grad,  // [T, hidden]
                                   S32 topk_idx,             // [T, top_k]
                                   Out<F32> token) {         // [kTokenSize]
  Call call;
  if (auto error = Locate(Op::kCombineBackwardSend, buffer, device, call); error.failure()) {
    return error;
  }
  if (auto error = CheckCombineBackwardSend(call.config(), out_grad, topk_idx, token);
      error.failure()) {
    return error;
  }
  ConstRows rows;
  rows.values = static_cast<const std::byte*>(out_grad.untyped_data());
  rows.values_bytes = RowBytes(out_grad);
  const int64_t num_tokens = topk_idx.dimensions()[0];
  WakeMover(call);
  LaunchRoute(call.view(),
              {{Op::kCombineBackwardSend, Kind::kCombineBackward, nullptr, token->typed_data()},
               rows.row_bytes(),
               topk_idx.typed_data(),
               nullptr,
               num_tokens},
              stream);
  LaunchPack(call.view(), {rows, num_tokens, false}, stream);
  return Enqueued(call);
}

ffi::Error SendSums(const Call& call, const PackSumsArgs& args, cudaStream_t stream) {
  WakeMover(call);
  LaunchPackSums(call.view(), args, stream);
  return Enqueued(call);
}

ffi::Error CombineSendImpl(std::string_view buffer, int32_t device, cudaStream_t stream,
                           ffi::AnyBuffer y,   // [N, hidden]
                           F32 weights,        // [N], or [0] for a plain sum
                           S32 rows,           // [ep_size * max_tokens, fanout]
                           S32 num_rows_from,  // [ep_size]
                           Out<F32> token) {   // [kTokenSize]
  Call call;
  if (auto error = Locate(Op::kCombineSend, buffer, device, call); error.failure()) return error;
  if (auto error = CheckCombineSend(call.config(), y, weights, rows, num_rows_from, token);
      error.failure()) {
    return error;
  }
  const PackSumsArgs args{{Op::kCombineSend, Kind::kCombine, nullptr, token->typed_data()},
                          MatrixOf(y),
                          ExpertRowsOf(y, weights, rows, num_rows_from),
                          nullptr,
                          true};
  return SendSums(call, args, stream);
}

ffi::Error DispatchBackwardSendImpl(std::string_view buffer, int32_t device, cudaStream_t stream,
                                    ffi::AnyBuffer x_grad,  // [N, hidden]
                                    F32 weight_grads,       // [ep_size * max_tokens, top_k]
                                    S32 rows,               // [ep_size * max_tokens, fanout]
                                    S32 num_rows_from,      // [ep_size]
                                    Out<F32> token) {       // [kTokenSize]
  Call call;
  if (auto error = Locate(Op::kDispatchBackwardSend, buffer, device, call); error.failure()) {
    return error;
  }
  if (auto error = CheckDispatchBackwardSend(call.config(), x_grad, weight_grads, rows,
                                             num_rows_from, token);
      error.failure()) {
    return error;
  }
  const PackSumsArgs args{
      {Op::kDispatchBackwardSend, Kind::kDispatchBackward, nullptr, token->typed_data()},
      MatrixOf(x_grad),
      {static_cast<const std::byte*>(x_grad.untyped_data()), nullptr,
       LayoutOf(rows, num_rows_from, x_grad.dimensions()[0])},
      weight_grads.typed_data(),
      false};
  return SendSums(call, args, stream);
}

SMF_SEND_TARGETS(SMF_DEFINE_HANDLER)

}  // namespace

std::vector<HandlerEntry> SendHandlers() { return {SMF_SEND_TARGETS(SMF_HANDLER_ENTRY)}; }

}  // namespace jax_sm_free::cuda
