#include "cc/cpu/host_call.h"

#include <utility>

#include "cc/cpu/numeric.h"
#include "cc/fault_texts.h"

namespace jax_sm_free {
namespace {

// Counts messages for the ranks that carried them.
void CountReceived(const HostCall& call, Hop hop, const std::vector<Message>& messages) {
  const int32_t rank = call.rank->rank;
  for (int32_t number = 0; number < call.config().ep_size; ++number) {
    if (!Comes(call.config(), hop, number, rank)) continue;
    call.rank->counters.CountReceived(CarrierOf(call.config(), hop, number, rank),
                                      messages[number]);
  }
}

}  // namespace

Fault Fail(const HostCall& call, int64_t run, Fault fault) {
  fault.op = OpName(call.op);
  fault.rank = call.rank->rank;
  NameNodes(call.config(), fault);
  call.rank->transport->Fail(run, fault);
  return fault;
}

std::optional<Fault> SendRound(const HostCall& call, ExchangeKey key, Hop hop,
                               const Parcels& parcels, const Transport::Pack& pack, bool finishes) {
  HostRank& rank = *call.rank;
  key.hop = hop;
  const auto counted = [&](const Transport::Parcel& parcel) {
    Message message = pack(parcel);
    rank.counters.CountSent(parcel.dst, message);
    return message;
  };
  return rank.transport->SendAll(key, rank.member, parcels, counted, finishes);
}

void Await(const HostCall& call, const Exchange& exchange, Then then, std::function<void()> end) {
  const FloatMode caller_mode;
  auto receive = [call, exchange, caller_mode, then = std::move(then),
                  end = std::move(end)](Transport::Arrival arrival) {
    std::optional<Fault> fault;
    if (const Fault* failed = FaultOf(arrival)) {
      fault = *failed;
    } else {
      auto& messages = std::get<std::vector<Message>>(arrival);
      CountReceived(call, exchange.key.hop, messages);
      fault = then(messages);
      if (fault && fault->op.empty()) fault = Fail(call, exchange.key.run, *fault);
    }
    arrival = Fault{};  // returns the blocks before the program continues
    end();
    caller_mode.Apply();  // the rest of the program may run on this thread now
    call.done(fault);
  };
  call.rank->transport->Receive(call.op, exchange, call.rank->member, std::move(receive));
}

}  // namespace jax_sm_free
