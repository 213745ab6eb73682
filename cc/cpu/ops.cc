#include "cc/cpu/ops.h"

#include <utility>

#include "cc/cpu/numeric.h"
#include "cc/cpu/quantize.h"
#include "cc/fault_texts.h"

namespace jax_sm_free {
namespace {

Fault Fail(const HostCall& call, int64_t run, Fault fault) {
  fault.op = OpName(call.op);
  fault.rank = call.rank->rank;
  call.rank->transport->Fail(run, fault);
  return fault;
}

// Opens an exchange, sends one message to each rank, and writes the token. `pack(dst)` makes the
// message for rank dst.
std::optional<Fault> SendAll(const HostCall& call, int64_t call_site, const Transport::Pack& pack,
                             float* token) {
  HostRank& rank = *call.rank;
  const Result<Exchange> begun = rank.ledger.Begin(call.op, call.run, call_site);
  if (const Fault* fault = FaultOf(begun)) {
    for (const int64_t lost : rank.ledger.TakeLostRuns()) Fail(call, lost, *fault);
    return Fail(call, call.run, *fault);
  }
  const auto& exchange = std::get<Exchange>(begun);
  if (auto fault = rank.transport->Begin(call.op, exchange, rank.member, call.site)) return fault;
  const auto counted = [&](int32_t dst) {
    Message message = pack(dst);
    rank.counters.CountSent(dst, message);
    return message;
  };
  if (auto fault = rank.transport->SendAll(exchange.key, rank.member, counted)) return fault;
  rank.ledger.WriteToken(exchange, token);
  return std::nullopt;
}

}  // namespace

std::optional<Fault> DispatchSend(const HostCall& call, int64_t call_site, int32_t position,
                                  const TopK& topk, const ConstRows& rows, float* token) {
  if (position != call.rank->position) {
    return Fail(call, call.run, PositionDiffers(call.rank->position, position));
  }
  const Result<Route> made = Route::Make(call.config(), topk);
  if (const Fault* fault = FaultOf(made)) return Fail(call, call.run, *fault);
  const auto& route = std::get<Route>(made);
  const auto pack = [&](int32_t dst) {
    return PackDispatch(call.config(), route.tokens(dst), topk, dst, rows, call.rank->pool.Take());
  };
  return SendAll(call, call_site, pack, token);
}

std::optional<Fault> DispatchSendQuantized(const HostCall& call, int64_t call_site,
                                           int32_t position, const TopK& topk, const Matrix& matrix,
                                           const std::byte* x, float* token) {
  const QuantizedRows quantized(matrix, x, topk.num_tokens);
  return DispatchSend(call, call_site, position, topk, quantized.rows(), token);
}

std::optional<Fault> CombineBackwardSend(const HostCall& call, int64_t call_site, const TopK& topk,
                                         const ConstRows& rows, float* token) {
  const Result<Route> made = Route::Make(call.config(), topk);
  if (const Fault* fault = FaultOf(made)) return Fail(call, call.run, *fault);
  const auto& route = std::get<Route>(made);
  const auto pack = [&](int32_t dst) {
    return PackRows(call.config(), KindOf(call.op), route.tokens(dst), rows,
                    call.rank->pool.Take());
  };
  return SendAll(call, call_site, pack, token);
}

std::optional<Fault> SendSums(const HostCall& call, int64_t call_site, const SumOperands& operands,
                              float* token) {
  if (auto fault = Check(call.config(), operands.layout)) return Fail(call, call.run, *fault);
  std::vector<Message> messages =
      PackSums(call.config(), KindOf(call.op), operands.matrix, operands.y, operands.weights,
               operands.weight_grads, operands.layout, call.rank->pool);
  const auto pack = [&](int32_t dst) { return std::move(messages[dst]); };
  return SendAll(call, call_site, pack, token);
}

void Receive(const HostCall& call, const float* token, Unpack unpack, Done done) {
  const Result<Exchange> finished = call.rank->ledger.Finish(call.op, token);
  if (const Fault* fault = FaultOf(finished)) {
    done(Fail(call, call.run, *fault));
    return;
  }
  const Exchange exchange = std::get<Exchange>(finished);
  const FloatMode caller_mode;
  auto receive = [call, exchange, caller_mode, unpack = std::move(unpack),
                  done = std::move(done)](Transport::Arrival arrival) {
    std::optional<Fault> fault;
    if (const Fault* failed = FaultOf(arrival)) {
      fault = *failed;
    } else {
      const auto& messages = std::get<std::vector<Message>>(arrival);
      call.rank->counters.CountReceived(exchange.kind, messages);
      fault = unpack(call.config(), messages);
      if (fault) fault = Fail(call, exchange.key.run, *fault);
    }
    arrival = Fault{};  // gives the blocks back before the program goes on
    call.rank->ledger.Release(exchange);
    caller_mode.Apply();  // `done` may run the rest of the program on this thread
    done(fault);
  };
  call.rank->transport->Receive(call.op, exchange, call.rank->member, std::move(receive));
}

Unpack UnpackInto(const HostCall& call, const ExpertsOut& out) {
  // The receiver that this is called from keeps the rank.
  return [rank = call.rank, out](const Config& config, const std::vector<Message>& messages) {
    std::optional<Fault> fault = UnpackExperts(config, messages, out);
    if (!fault) rank->counters.CountDropped(*out.dropped);
    return fault;
  };
}

}  // namespace jax_sm_free
