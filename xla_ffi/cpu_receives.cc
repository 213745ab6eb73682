// Receives on CPUs.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "cc/cpu/ops.h"
#include "cc/cpu/unpack.h"
#include "cc/op.h"
#include "xla/ffi/api/ffi.h"
#include "xla_ffi/cpu_call.h"
#include "xla_ffi/cpu_handlers.h"
#include "xla_ffi/decode.h"
#include "xla_ffi/operand_checks.h"
#include "xla_ffi/signatures.h"

namespace jax_sm_free {
namespace {

ffi::Future Failed(const ffi::Error& error) {
  ffi::Promise promise;
  ffi::Future future(promise);
  promise.SetError(error);
  return future;
}

// Takes the token's exchange, and resolves the returned future when `unpack` has run. XLA keeps
// operands and results until then, but not the descriptions of their shapes.
ffi::Future ReceiveAsync(const HostCall& call, const F32& token, Unpack unpack) {
  ffi::Promise promise;
  ffi::Future future(promise);
  auto done = [promise](const std::optional<Fault>& fault) mutable {
    if (fault) {
      promise.SetError(ToError(fault));
    } else {
      promise.SetAvailable();
    }
  };
  Receive(call, token.typed_data(), std::move(unpack), std::move(done));
  return future;
}

// A dispatch's recv, and what its rows become.
struct DispatchRecv {
  HostCall call;
  std::optional<Matrix> dequantized;
  MutableRows rows;
};
DispatchRecv MakeDispatchRecv(const HostCall& call, Out<ffi::AnyBuffer>& values,
                              Out<ffi::AnyBuffer>& scales) {
  return {call, QuantizedOf(call.config(), *values), RowsOf(values, scales)};
}

ffi::Future DispatchRecvImpl(std::string_view buffer, ffi::RunId run, int32_t device,
                             F32 token,                   // [kTokenSize]
                             ffi::AnyBuffer own_values,   // [T or 0, values columns]
                             ffi::AnyBuffer own_scales,   // [T or 0, scales columns]
                             Out<ffi::AnyBuffer> values,  // [recv_capacity, values columns]
                             Out<ffi::AnyBuffer> scales,  // [recv_capacity, scales columns]
                             Out<S32> group_sizes,        // [num_local_experts]
                             Out<S32> counts,             // [num_local_experts]
                             Out<F32> weights,            // [recv_capacity]
                             Out<S32> dropped,            // []
                             Out<S32> rows,               // [ep_size * max_tokens, top_k]
                             Out<S32> num_rows_from) {    // [ep_size]
  HostCall call;
  if (auto error = Locate(Op::kDispatchRecv, buffer, device, run, call); error.failure()) {
    return Failed(error);
  }
  if (auto error = CheckReceivedRows(call.config(), token, own_values, own_scales, values, scales,
                                     call.config().recv_capacity);
      error.failure()) {
    return Failed(error);
  }
  if (auto error = CheckReceivedExperts(call.config(), group_sizes, counts, weights, dropped, rows,
                                        num_rows_from);
      error.failure()) {
    return Failed(error);
  }
  const DispatchRecv recv = MakeDispatchRecv(call, values, scales);
  const ExpertsOut out{.rows = recv.rows,
                       .dequantized = recv.dequantized,
                       .group_sizes = group_sizes->typed_data(),
                       .counts = counts->typed_data(),
                       .weights = weights->typed_data(),
                       .dropped = dropped->typed_data(),
                       .layout = {rows->typed_data(), num_rows_from->typed_data()}};
  return ReceiveAsync(recv.call, token, UnpackInto(recv.call, out));
}

ffi::Future DispatchRecvTokensImpl(std::string_view buffer, ffi::RunId run, int32_t device,
                                   F32 token,                   // [kTokenSize]
                                   ffi::AnyBuffer own_values,   // [T or 0, values columns]
                                   ffi::AnyBuffer own_scales,   // [T or 0, scales columns]
                                   Out<ffi::AnyBuffer> values,  // [R, values columns],
                                   Out<ffi::AnyBuffer> scales,  // [R, scales columns],
                                   Out<S32> topk_idx,           // [R, top_k]; R is
                                   Out<F32> topk_weights,       // [R, top_k]  ep_size * max_tokens
                                   Out<S32> counts,             // [num_local_experts]
                                   Out<S32> num_tokens,         // []
                                   Out<S32> rows,               // [R, 1]
                                   Out<S32> num_rows_from) {    // [ep_size]
  HostCall call;
  if (auto error = Locate(Op::kDispatchRecv, buffer, device, run, call); error.failure()) {
    return Failed(error);
  }
  if (auto error = CheckReceivedRows(call.config(), token, own_values, own_scales, values, scales,
                                     call.config().max_recv_tokens());
      error.failure()) {
    return Failed(error);
  }
  if (auto error = CheckReceivedTokens(call.config(), topk_idx, topk_weights, counts, num_tokens,
                                       rows, num_rows_from);
      error.failure()) {
    return Failed(error);
  }
  const DispatchRecv recv = MakeDispatchRecv(call, values, scales);
  const TokensOut out{.rows = recv.rows,
                      .dequantized = recv.dequantized,
                      .topk_idx = topk_idx->typed_data(),
                      .topk_weights = topk_weights->typed_data(),
                      .counts = counts->typed_data(),
                      .num_tokens = num_tokens->typed_data(),
                      .layout = {rows->typed_data(), num_rows_from->typed_data()}};
  return ReceiveAsync(recv.call, token, [out](const Config& config, const auto& messages) {
    return UnpackTokens(config, messages, out);
  });
}

// The sum over ranks; `weight_grads` is null in the forward pass.
ffi::Future ReceiveSums(const HostCall& call, const F32& token, const S32& topk_idx,
                        Out<ffi::AnyBuffer>& out, float* weight_grads) {
  const Matrix matrix = MatrixOf(*out);
  const TopK topk{topk_idx.typed_data(), nullptr, topk_idx.dimensions()[0]};
  auto* sums = static_cast<std::byte*>(out->untyped_data());
  return ReceiveAsync(
      call, token, [matrix, topk, sums, weight_grads](const Config& config, const auto& messages) {
        return SumOverRanks(config, matrix, topk, messages, sums, weight_grads);
      });
}

ffi::Future CombineRecvImpl(std::string_view buffer, ffi::RunId run, int32_t device,
                            F32 token,                  // [kTokenSize]
                            S32 topk_idx,               // [T, top_k]
                            ffi::AnyBuffer y,           // [N, hidden], as for the send
                            F32 weights,                // [N], or [0] for a plain sum
                            S32 rows,                   // [ep_size * max_tokens, fanout]
                            S32 num_rows_from,          // [ep_size]
                            Out<ffi::AnyBuffer> out) {  // [T, hidden]
  HostCall call;
  if (auto error = Locate(Op::kCombineRecv, buffer, device, run, call); error.failure()) {
    return Failed(error);
  }
  if (auto error =
          CheckCombineRecv(call.config(), token, topk_idx, y, weights, rows, num_rows_from, out);
      error.failure()) {
    return Failed(error);
  }
  return ReceiveSums(call, token, topk_idx, out, nullptr);
}

ffi::Future DispatchBackwardRecvImpl(std::string_view buffer, ffi::RunId run, int32_t device,
                                     F32 token,                   // [kTokenSize]
                                     S32 topk_idx,                // [T, top_k]
                                     Out<ffi::AnyBuffer> x_grad,  // [T, hidden]
                                     Out<F32> weight_grads) {     // [T, top_k]
  HostCall call;
  if (auto error = Locate(Op::kDispatchBackwardRecv, buffer, device, run, call); error.failure()) {
    return Failed(error);
  }
  if (auto error = CheckDispatchBackwardRecv(call.config(), token, topk_idx, x_grad, weight_grads);
      error.failure()) {
    return Failed(error);
  }
  return ReceiveSums(call, token, topk_idx, x_grad, weight_grads->typed_data());
}

ffi::Future CombineBackwardRecvImpl(std::string_view buffer, ffi::RunId run, int32_t device,
                                    F32 token,                   // [kTokenSize]
                                    ffi::AnyBuffer y,            // [N, hidden], or [0, hidden]
                                    F32 weights,                 // [N], or [0] for a plain sum
                                    S32 rows,                    // [ep_size * max_tokens, fanout]
                                    S32 num_rows_from,           // [ep_size]
                                    Out<ffi::AnyBuffer> y_grad,  // [N, hidden]
                                    Out<F32> weight_grads) {     // [N], or [0]
  HostCall call;
  if (auto error = Locate(Op::kCombineBackwardRecv, buffer, device, run, call); error.failure()) {
    return Failed(error);
  }
  if (auto error = CheckCombineBackwardRecv(call.config(), token, y, weights, rows, num_rows_from,
                                            y_grad, weight_grads);
      error.failure()) {
    return Failed(error);
  }
  const Matrix matrix = MatrixOf(*y_grad);
  const LayoutIn layout = LayoutOf(rows, num_rows_from, y_grad->dimensions()[0]);
  const auto* values = static_cast<const std::byte*>(y.untyped_data());
  const float* scale = DataOrNull(weights);
  auto* grads = static_cast<std::byte*>(y_grad->untyped_data());
  float* scale_grads = weight_grads->typed_data();
  return ReceiveAsync(call, token,
                      [matrix, layout, values, scale, grads, scale_grads](const Config& config,
                                                                          const auto& messages) {
                        return SpreadGradients(config, matrix, messages, layout, values, scale,
                                               grads, scale_grads);
                      });
}

// A receive: the program's name for the buffer, the run, and the device that the call runs on.
auto BindCall() {
  return ffi::Ffi::Bind()
      .Attr<std::string_view>("buffer")
      .Ctx<ffi::RunId>()
      .Ctx<ffi::DeviceOrdinal>();
}

SMF_RECEIVE_TARGETS(SMF_DEFINE_HANDLER)

}  // namespace

std::vector<HandlerEntry> CpuReceiveHandlers() { return {SMF_RECEIVE_TARGETS(SMF_HANDLER_ENTRY)}; }

}  // namespace jax_sm_free
