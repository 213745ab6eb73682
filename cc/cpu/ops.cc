#include "cc/cpu/ops.h"

#include <utility>

#include "cc/cpu/exchange.h"
#include "cc/cpu/numeric.h"
#include "cc/cpu/pack.h"
#include "cc/cpu/reduce.h"
#include "cc/cpu/unpack.h"
#include "cc/cpu/wire_rows.h"
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
std::optional<Fault> SendAll(const HostCall& call, const Transport::Pack& pack, float* token) {
  HostRank& rank = *call.rank;
  const Result<Exchange> begun = rank.ledger.Begin(call.op, call.run, call.call_site);
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

// Sends token rows to the ranks of their experts. `pack_rows(tokens, dst)` makes the message of
// these tokens.
template <typename PackRows>
std::optional<Fault> SendRows(const HostCall& call, const TopK& topk, const PackRows& pack_rows,
                              float* token) {
  const Result<Route> made = Route::Make(call.config(), topk);
  if (const Fault* fault = FaultOf(made)) return Fail(call, call.run, *fault);
  const auto& route = std::get<Route>(made);
  const auto pack = [&](int32_t dst) { return pack_rows(route.tokens(dst), dst); };
  return SendAll(call, pack, token);
}

}  // namespace

std::optional<Fault> DispatchSend(const HostCall& call, const DispatchSendIn& in, float* token) {
  if (*in.position != call.rank->position) {
    return Fail(call, call.run, PositionDiffers(call.rank->position, *in.position));
  }
  const WireRows rows(in.format, in.rows, in.topk.num_tokens);
  const auto pack = [&](const auto& tokens, int32_t dst) {
    return PackDispatch(call.config(), tokens, in.topk, dst, rows.rows(), call.rank->pool.Take());
  };
  return SendRows(call, in.topk, pack, token);
}

std::optional<Fault> CombineBackwardSend(const HostCall& call, const RowsIn& in, float* token) {
  const auto pack = [&](const auto& tokens, int32_t /*dst*/) {
    return PackRows(call.config(), KindOf(call.op), tokens, in.rows, call.rank->pool.Take());
  };
  return SendRows(call, in.topk, pack, token);
}

std::optional<Fault> SendSums(const HostCall& call, const SumsIn& in, float* token) {
  if (auto fault = Check(call.config(), in.rows.layout)) return Fail(call, call.run, *fault);
  std::vector<Message> messages =
      PackSums(call.config(), KindOf(call.op), in.matrix, in.rows.y, in.rows.weights,
               in.weight_grads, in.rows.layout, call.rank->pool);
  const auto pack = [&](int32_t dst) { return std::move(messages[dst]); };
  return SendAll(call, pack, token);
}

void Receive(const HostCall& call, const float* token, Unpack unpack) {
  const Result<Exchange> finished = call.rank->ledger.Finish(call.op, token);
  if (const Fault* fault = FaultOf(finished)) {
    call.done(Fail(call, call.run, *fault));
    return;
  }
  const Exchange exchange = std::get<Exchange>(finished);
  const FloatMode caller_mode;
  auto receive = [call, exchange, caller_mode,
                  unpack = std::move(unpack)](Transport::Arrival arrival) {
    std::optional<Fault> fault;
    if (const Fault* failed = FaultOf(arrival)) {
      fault = *failed;
    } else {
      const auto& messages = std::get<std::vector<Message>>(arrival);
      call.rank->counters.CountReceived(exchange.kind, messages);
      fault = unpack(call.config(), messages);
      if (fault) fault = Fail(call, exchange.key.run, *fault);
    }
    arrival = Fault{};  // returns the blocks before the program continues
    call.rank->ledger.Release(exchange);
    caller_mode.Apply();  // the rest of the program may run on this thread now
    call.done(fault);
  };
  call.rank->transport->Receive(call.op, exchange, call.rank->member, std::move(receive));
}

void DispatchRecv(const HostCall& call, const float* token, const OwnRows& /*own*/,
                  const ExpertsOut& out) {
  // `receive` in Receive holds the rank as long as this function exists.
  Receive(call, token,
          [rank = call.rank, out](const Config& config, const std::vector<Message>& messages) {
            std::optional<Fault> fault = UnpackExperts(config, messages, out);
            if (!fault) rank->counters.CountDropped(*out.dropped);
            return fault;
          });
}

void DispatchRecvTokens(const HostCall& call, const float* token, const OwnRows& /*own*/,
                        const TokensOut& out) {
  Receive(call, token, [out](const Config& config, const std::vector<Message>& messages) {
    return UnpackTokens(config, messages, out);
  });
}

void ReceiveSums(const HostCall& call, const float* token, const std::optional<ExpertRows>& /*own*/,
                 const SumsOut& out) {
  Receive(call, token, [out](const Config& config, const std::vector<Message>& messages) {
    return SumOverRanks(config, out.matrix, out.topk, messages, out.sums, out.weight_grads);
  });
}

void CombineBackwardRecv(const HostCall& call, const float* token, const SpreadOut& out) {
  Receive(call, token, [out](const Config& config, const std::vector<Message>& messages) {
    return SpreadGradients(config, out.matrix, messages, out.rows.layout, out.rows.y,
                           out.rows.weights, out.y_grad, out.weight_grads);
  });
}

}  // namespace jax_sm_free
