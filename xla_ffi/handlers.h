// The handlers of all ops, written once for all platforms. A handler decodes the operands, checks
// them, calls the op layer, and converts its result.
//
// A platform has a type `Call`, which its op layer takes, and three types `Send`, `Recv` and
// `Forward`, which run a call of a send, of a recv and of a forward. A platform without two tiers
// has no `Forward`. Each of the three has:
//
//   Buffer: how a call names its buffer: a decoded attribute, or a state
//   Context: the device, the run and the stream of a call, as far as the platform has them
//   Result: ffi::Error or ffi::Future
//   ffi::Error Find(Op, Buffer, Context): finds the buffer and the rank
//   const Call& call(): the call with the buffer and the rank
//   Result Run(run): calls `run`, and converts what the op layer returns
//   Result Fail(ffi::Error)

#ifndef JAX_SM_FREE_XLA_FFI_HANDLERS_H_
#define JAX_SM_FREE_XLA_FFI_HANDLERS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cc/op_table.h"
#include "cc/operands.h"
#include "xla/ffi/api/ffi.h"
#include "xla_ffi/decode.h"
#include "xla_ffi/handler_entry.h"

namespace jax_sm_free {

// Each function decodes operands that were checked, and calls the op layer of the platform.
// cc/op_table.cc has the sizes of the operands. jax_sm_free/primitives.py passes them.

template <typename Call>
auto RunDispatchSend(const Call& call, ffi::AnyBuffer values, ffi::AnyBuffer scales, S32 topk_idx,
                     F32 topk_weights, S32 position, Out<F32> token) {
  const DispatchSendIn in{
      .position = position.typed_data(),
      .topk = {topk_idx.typed_data(), topk_weights.typed_data(), topk_idx.dimensions()[0]},
      .rows = RowsOf(values, scales),
      .format = FormatOf(call.config(), values)};
  return DispatchSend(call, in, token->typed_data());
}

template <typename Call>
auto RunDispatchRecv(const Call& call, F32 token, ffi::AnyBuffer own_values,
                     ffi::AnyBuffer own_scales, Out<ffi::AnyBuffer> values,
                     Out<ffi::AnyBuffer> scales, Out<S32> group_sizes, Out<S32> counts,
                     Out<F32> weights, Out<S32> dropped, Out<S32> rows, Out<S32> num_rows_from) {
  const ExpertsOut out{.rows = RowsOf(values, scales),
                       .format = FormatOf(call.config(), *values),
                       .group_sizes = group_sizes->typed_data(),
                       .counts = counts->typed_data(),
                       .weights = weights->typed_data(),
                       .dropped = dropped->typed_data(),
                       .layout = LayoutResult(rows, num_rows_from)};
  const OwnRows own{RowsOf(own_values, own_scales), own_values.dimensions()[0]};
  return DispatchRecv(call, token.typed_data(), own, out);
}

template <typename Call>
auto RunDispatchRecvTokens(const Call& call, F32 token, ffi::AnyBuffer own_values,
                           ffi::AnyBuffer own_scales, Out<ffi::AnyBuffer> values,
                           Out<ffi::AnyBuffer> scales, Out<S32> topk_idx, Out<F32> topk_weights,
                           Out<S32> counts, Out<S32> num_tokens, Out<S32> rows,
                           Out<S32> num_rows_from) {
  const TokensOut out{.rows = RowsOf(values, scales),
                      .format = FormatOf(call.config(), *values),
                      .topk_idx = topk_idx->typed_data(),
                      .topk_weights = topk_weights->typed_data(),
                      .counts = counts->typed_data(),
                      .num_tokens = num_tokens->typed_data(),
                      .layout = LayoutResult(rows, num_rows_from)};
  const OwnRows own{RowsOf(own_values, own_scales), own_values.dimensions()[0]};
  return DispatchRecvTokens(call, token.typed_data(), own, out);
}

template <typename Call>
auto RunCombineSend(const Call& call, ffi::AnyBuffer y, F32 weights, S32 rows, S32 num_rows_from,
                    Out<F32> token) {
  const SumsIn in{
      .matrix = MatrixOf(y),
      .rows = ExpertRowsOf(y, DataOrNull(weights), rows, num_rows_from, y.dimensions()[0])};
  return SendSums(call, in, token->typed_data());
}

template <typename Call>
auto RunCombineRecv(const Call& call, F32 token, S32 topk_idx, ffi::AnyBuffer y, F32 weights,
                    S32 rows, S32 num_rows_from, Out<ffi::AnyBuffer> out) {
  const ExpertRows own =
      ExpertRowsOf(y, DataOrNull(weights), rows, num_rows_from, y.dimensions()[0]);
  const SumsOut sums{.matrix = MatrixOf(*out),
                     .topk = {topk_idx.typed_data(), nullptr, topk_idx.dimensions()[0]},
                     .sums = BytesOf(out)};
  return ReceiveSums(call, token.typed_data(), own, sums);
}

template <typename Call>
auto RunCombineBackwardSend(const Call& call, ffi::AnyBuffer out_grad, S32 topk_idx,
                            Out<F32> token) {
  const RowsIn in{.topk = {topk_idx.typed_data(), nullptr, topk_idx.dimensions()[0]},
                  .rows = {.values = BytesOf(out_grad), .values_bytes = RowBytes(out_grad)}};
  return CombineBackwardSend(call, in, token->typed_data());
}

template <typename Call>
auto RunCombineBackwardRecv(const Call& call, F32 token, ffi::AnyBuffer y, F32 weights, S32 rows,
                            S32 num_rows_from, Out<ffi::AnyBuffer> y_grad, Out<F32> weight_grads) {
  const SpreadOut out{
      .matrix = MatrixOf(*y_grad),
      .rows = ExpertRowsOf(y, DataOrNull(weights), rows, num_rows_from, y_grad->dimensions()[0]),
      .y_grad = BytesOf(y_grad),
      .weight_grads = weight_grads->typed_data()};
  return CombineBackwardRecv(call, token.typed_data(), out);
}

template <typename Call>
auto RunDispatchBackwardSend(const Call& call, ffi::AnyBuffer x_grad, F32 weight_grads, S32 rows,
                             S32 num_rows_from, Out<F32> token) {
  const SumsIn in{
      .matrix = MatrixOf(x_grad),
      .rows = ExpertRowsOf(x_grad, nullptr, rows, num_rows_from, x_grad.dimensions()[0]),
      .weight_grads = weight_grads.typed_data()};
  return SendSums(call, in, token->typed_data());
}

template <typename Call>
auto RunDispatchBackwardRecv(const Call& call, F32 token, S32 topk_idx, Out<ffi::AnyBuffer> x_grad,
                             Out<F32> weight_grads) {
  const SumsOut sums{.matrix = MatrixOf(*x_grad),
                     .topk = {topk_idx.typed_data(), nullptr, topk_idx.dimensions()[0]},
                     .sums = BytesOf(x_grad),
                     .weight_grads = weight_grads->typed_data()};
  return ReceiveSums(call, token.typed_data(), std::nullopt, sums);
}

template <typename Call>
auto RunDispatchForward(const Call& call, F32 token, Out<F32> token_out, Out<S32> node_topk) {
  return DispatchForward(call, token.typed_data(),
                         ForwardOut{token_out->typed_data(), node_topk->typed_data()});
}

// combine_forward, dispatch_backward_forward.
template <typename Call>
auto RunForwardSums(const Call& call, F32 token, S32 node_topk, Out<F32> token_out) {
  return ForwardSums(call, token.typed_data(), ForwardIn{node_topk.typed_data()},
                     token_out->typed_data());
}

template <typename Call>
auto RunCombineBackwardForward(const Call& call, F32 token, S32 node_topk, Out<F32> token_out) {
  return CombineBackwardForward(call, token.typed_data(), ForwardIn{node_topk.typed_data()},
                                token_out->typed_data());
}

// The FFI handler of an op: it checks a call against `table` and then calls `run`. `Site` is the
// Send or Recv of the platform.
template <typename Site, const OpTable& table, auto run>
struct Handler;

template <typename Site, const OpTable& table, typename Ran, typename Call, typename... Arrays,
          Ran (*run)(const Call&, Arrays...)>
struct Handler<Site, table, run> {
  static typename Site::Result Execute(typename Site::Buffer buffer, typename Site::Context context,
                                       Arrays... arrays) {
    Site site;
    if (auto error = site.Find(table.op, buffer, context); error.failure()) {
      return site.Fail(std::move(error));
    }
    const Given given[] = {GivenOf(arrays)...};
    if (auto error = CheckOperands(table, site.call().config(), given)) {
      return site.Fail(ffi::Error::InvalidArgument(*std::move(error)));
    }
    return site.Run([&] { return run(site.call(), arrays...); });
  }

  static XLA_FFI_Error* Entry(XLA_FFI_CallFrame* frame) {
    static auto* const handler = ffi::Ffi::BindTo(Execute).release();
    return handler->Call(frame);
  }
};

// Every target of a platform. `instantiate` makes the state of a send, on platforms where sends
// have a state.
template <typename Platform>
std::vector<HandlerEntry> HandlersOf(XLA_FFI_Handler* instantiate = nullptr) {
  using Call = typename Platform::Call;
  using Send = typename Platform::Send;
  using Recv = typename Platform::Recv;
  std::vector<HandlerEntry> entries = {
      {"smf_dispatch_send", instantiate,
       Handler<Send, kDispatchSendTable, &RunDispatchSend<Call>>::Entry},
      {"smf_dispatch_recv", nullptr,
       Handler<Recv, kDispatchRecvTable, &RunDispatchRecv<Call>>::Entry},
      {"smf_dispatch_recv_tokens", nullptr,
       Handler<Recv, kDispatchRecvTokensTable, &RunDispatchRecvTokens<Call>>::Entry},
      {"smf_combine_send", instantiate,
       Handler<Send, kCombineSendTable, &RunCombineSend<Call>>::Entry},
      {"smf_combine_recv", nullptr, Handler<Recv, kCombineRecvTable, &RunCombineRecv<Call>>::Entry},
      {"smf_combine_backward_send", instantiate,
       Handler<Send, kCombineBackwardSendTable, &RunCombineBackwardSend<Call>>::Entry},
      {"smf_combine_backward_recv", nullptr,
       Handler<Recv, kCombineBackwardRecvTable, &RunCombineBackwardRecv<Call>>::Entry},
      {"smf_dispatch_backward_send", instantiate,
       Handler<Send, kDispatchBackwardSendTable, &RunDispatchBackwardSend<Call>>::Entry},
      {"smf_dispatch_backward_recv", nullptr,
       Handler<Recv, kDispatchBackwardRecvTable, &RunDispatchBackwardRecv<Call>>::Entry},
  };
  if constexpr (requires { typename Platform::Forward; }) {
    using Forward = typename Platform::Forward;
    entries.insert(
        entries.end(),
        {{"smf_dispatch_forward", nullptr,
          Handler<Forward, kDispatchForwardTable, &RunDispatchForward<Call>>::Entry},
         {"smf_combine_forward", nullptr,
          Handler<Forward, kCombineForwardTable, &RunForwardSums<Call>>::Entry},
         {"smf_combine_backward_forward", nullptr,
          Handler<Forward, kCombineBackwardForwardTable, &RunCombineBackwardForward<Call>>::Entry},
         {"smf_dispatch_backward_forward", nullptr,
          Handler<Forward, kDispatchBackwardForwardTable, &RunForwardSums<Call>>::Entry}});
  }
  return entries;
}

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_XLA_FFI_HANDLERS_H_
