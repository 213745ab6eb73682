// Sends on CPUs.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "cc/cpu/ops.h"
#include "cc/op.h"
#include "xla/ffi/api/ffi.h"
#include "xla_ffi/cpu_call.h"
#include "xla_ffi/cpu_handlers.h"
#include "xla_ffi/decode.h"
#include "xla_ffi/operand_checks.h"
#include "xla_ffi/send_site.h"
#include "xla_ffi/signatures.h"

namespace jax_sm_free {
namespace {

// A send's `site` has its name by then.
ffi::Error LocateSend(Op op, SendSite* site, int32_t device, ffi::RunId run, HostCall& call,
                      int64_t& number) {
  if (auto error = Locate(op, site->buffer, device, run, call); error.failure()) return error;
  number = site->number;
  if (site->copy == nullptr) return ffi::Error::Success();
  call.site = site->copy->Site();
  number = call.site->number;
  return ffi::Error::Success();
}

ffi::Error DispatchSendImpl(ffi::RunId run, int32_t device, SendSite* site,
                            ffi::AnyBuffer values,  // [T, values columns]
                            ffi::AnyBuffer scales,  // [T, scales columns], 0 columns if none
                            S32 topk_idx,           // [T, top_k]
                            F32 topk_weights,       // [T, top_k]
                            S32 position,           // [], in the mesh
                            Out<F32> token) {       // [kTokenSize]
  HostCall call;
  int64_t number = 0;
  if (auto error = LocateSend(Op::kDispatchSend, site, device, run, call, number);
      error.failure()) {
    return error;
  }
  if (auto error =
          CheckDispatchSend(call.config(), values, scales, topk_idx, topk_weights, position, token);
      error.failure()) {
    return error;
  }
  const ConstRows rows = RowsOf(values, scales);
  const std::optional<Matrix> quantized = QuantizedOf(call.config(), values);
  const TopK topk{topk_idx.typed_data(), topk_weights.typed_data(), topk_idx.dimensions()[0]};
  if (quantized) {
    return ToError(DispatchSendQuantized(call, number, position.typed_data()[0], topk, *quantized,
                                         rows.values, token->typed_data()));
  }
  return ToError(
      DispatchSend(call, number, position.typed_data()[0], topk, rows, token->typed_data()));
}

ffi::Error CombineBackwardSendImpl(ffi::RunId run, int32_t device, SendSite* site,
                                   ffi::AnyBuffer out_grad,  // [T, hidden]
                                   S32 topk_idx,             // [T, top_k]
                                   Out<F32> token) {         // [kTokenSize]
  HostCall call;
  int64_t number = 0;
  if (auto error = LocateSend(Op::kCombineBackwardSend, site, device, run, call, number);
      error.failure()) {
    return error;
  }
  if (auto error = CheckCombineBackwardSend(call.config(), out_grad, topk_idx, token);
      error.failure()) {
    return error;
  }
  const ConstRows rows{.values = static_cast<const std::byte*>(out_grad.untyped_data()),
                       .values_bytes = RowBytes(out_grad)};
  const TopK topk{topk_idx.typed_data(), nullptr, topk_idx.dimensions()[0]};
  return ToError(CombineBackwardSend(call, number, topk, rows, token->typed_data()));
}

ffi::Error CombineSendImpl(ffi::RunId run, int32_t device, SendSite* site,
                           ffi::AnyBuffer y,   // [N, hidden]
                           F32 weights,        // [N], or [0] for a plain sum
                           S32 rows,           // [ep_size * max_tokens, fanout]
                           S32 num_rows_from,  // [ep_size]
                           Out<F32> token) {   // [kTokenSize]
  HostCall call;
  int64_t number = 0;
  if (auto error = LocateSend(Op::kCombineSend, site, device, run, call, number); error.failure()) {
    return error;
  }
  if (auto error = CheckCombineSend(call.config(), y, weights, rows, num_rows_from, token);
      error.failure()) {
    return error;
  }
  const SumOperands operands{.matrix = MatrixOf(y),
                             .y = static_cast<const std::byte*>(y.untyped_data()),
                             .weights = DataOrNull(weights),
                             .layout = LayoutOf(rows, num_rows_from, y.dimensions()[0])};
  return ToError(SendSums(call, number, operands, token->typed_data()));
}

ffi::Error DispatchBackwardSendImpl(ffi::RunId run, int32_t device, SendSite* site,
                                    ffi::AnyBuffer x_grad,  // [N, hidden]
                                    F32 weight_grads,       // [ep_size * max_tokens, top_k]
                                    S32 rows,               // [ep_size * max_tokens, fanout]
                                    S32 num_rows_from,      // [ep_size]
                                    Out<F32> token) {       // [kTokenSize]
  HostCall call;
  int64_t number = 0;
  if (auto error = LocateSend(Op::kDispatchBackwardSend, site, device, run, call, number);
      error.failure()) {
    return error;
  }
  if (auto error = CheckDispatchBackwardSend(call.config(), x_grad, weight_grads, rows,
                                             num_rows_from, token);
      error.failure()) {
    return error;
  }
  const SumOperands operands{.matrix = MatrixOf(x_grad),
                             .y = static_cast<const std::byte*>(x_grad.untyped_data()),
                             .weight_grads = weight_grads.typed_data(),
                             .layout = LayoutOf(rows, num_rows_from, x_grad.dimensions()[0])};
  return ToError(SendSums(call, number, operands, token->typed_data()));
}

// A send: its site has the buffer.
auto BindCall() {
  return ffi::Ffi::Bind().Ctx<ffi::RunId>().Ctx<ffi::DeviceOrdinal>().Ctx<ffi::State<SendSite>>();
}

SMF_SEND_TARGETS(SMF_DEFINE_HANDLER)

}  // namespace

std::vector<HandlerEntry> CpuSendHandlers() {
  std::vector<HandlerEntry> handlers = {SMF_SEND_TARGETS(SMF_HANDLER_ENTRY)};
  for (HandlerEntry& entry : handlers) entry.instantiate = MakeSendSiteHandler();
  return handlers;
}

}  // namespace jax_sm_free
