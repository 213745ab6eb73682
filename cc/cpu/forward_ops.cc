// The forwards of cc/cpu/ops.h.

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "cc/cpu/forward.h"
#include "cc/cpu/hop.h"
#include "cc/cpu/host_call.h"
#include "cc/cpu/ops.h"
#include "cc/cpu/pack.h"
#include "cc/cpu/parcels.h"
#include "cc/tiers.h"

namespace jax_sm_free {
namespace {

// The common part of all forwards. `pack(messages, parcel)` makes what goes on from what has come.
// `check` looks at what has come first.
using Look = std::function<std::optional<Fault>(std::vector<Message>& messages)>;
using PackOn =
    std::function<Message(const std::vector<Message>& messages, const Transport::Parcel& parcel)>;
void Forward(const HostCall& call, const float* token, Look look, PackOn pack, float* token_out) {
  const Result<Exchange> taken = call.rank->ledger.Forward(call.op, token);
  if (const Fault* fault = FaultOf(taken)) return call.done(Fail(call, call.run, *fault));
  const Exchange exchange = std::get<Exchange>(taken);
  auto send_on = [call, exchange, token_out, look = std::move(look),
                  pack = std::move(pack)](std::vector<Message>& messages) -> std::optional<Fault> {
    if (auto fault = look(messages)) return fault;
    const Hop hop = LastHop(call.config(), exchange.kind);
    const Parcels parcels = ParcelsOfForward(call.config(), hop, call.rank->rank);
    const auto pack_here = [&](const Transport::Parcel& parcel) { return pack(messages, parcel); };
    if (auto fault = SendRound(call, exchange.key, hop, parcels, pack_here, true)) return fault;
    call.rank->ledger.WriteToken(exchange, token_out);
    return std::nullopt;
  };
  Await(call, exchange, std::move(send_on), [] {});
}

}  // namespace

void DispatchForward(const HostCall& call, const float* token, const ForwardOut& out) {
  const Config& config = call.config();
  // The rows of each rail message that go to each place of this node; by number of the message.
  auto routes = std::make_shared<std::vector<Route>>(config.ep_size);
  auto look = [call, out, routes](std::vector<Message>& messages) -> std::optional<Fault> {
    const Config& config = call.config();
    const int32_t place = PlaceInNode(config, call.rank->rank);
    for (int32_t node = 0; node < config.num_nodes; ++node) {
      const int32_t number = RankAt(config, node, place);
      const bool is_own = node == NodeOf(config, call.rank->rank);
      WriteNodeTopK(config, node, is_own ? nullptr : &messages[number], out.node_topk);
      Result<Route> route = Route::Make(NodeConfig(config), RailRows(config, node, out.node_topk));
      if (const Fault* fault = FaultOf(route)) return *fault;
      (*routes)[number] = std::get<Route>(std::move(route));
    }
    return std::nullopt;
  };
  auto pack = [call, routes](const std::vector<Message>& messages,
                             const Transport::Parcel& parcel) {
    const int32_t place = PlaceInNode(call.config(), parcel.dst);
    return ForwardDispatch(call.config(), messages[parcel.number],
                           (*routes)[parcel.number].tokens(place), place, call.rank->pool.Take());
  };
  Forward(call, token, std::move(look), std::move(pack), out.token);
}

void CombineBackwardForward(const HostCall& call, const float* token, const ForwardIn& in,
                            float* token_out) {
  auto routes = std::make_shared<std::vector<Route>>(call.config().ep_size);
  auto look = [call, in, routes](std::vector<Message>& messages) -> std::optional<Fault> {
    const Config& config = call.config();
    const int32_t place = PlaceInNode(config, call.rank->rank);
    for (int32_t node = 0; node < config.num_nodes; ++node) {
      if (node == NodeOf(config, call.rank->rank)) continue;
      const int32_t number = RankAt(config, node, place);
      const TopK rows = RailRows(config, node, in.node_topk);
      const Message& rail = messages[number];
      auto fault = CheckMessage(rail, number, rows.num_tokens, rail.header().row_bytes);
      if (fault) return fault;
      Result<Route> route = Route::Make(NodeConfig(config), rows);
      if (const Fault* bad = FaultOf(route)) return *bad;
      (*routes)[number] = std::get<Route>(std::move(route));
    }
    return std::nullopt;
  };
  auto pack = [call, routes](const std::vector<Message>& messages,
                             const Transport::Parcel& parcel) {
    const int32_t place = PlaceInNode(call.config(), parcel.dst);
    return ForwardRows(call.config(), messages[parcel.number],
                       (*routes)[parcel.number].tokens(place), call.rank->pool.Take());
  };
  Forward(call, token, std::move(look), std::move(pack), token_out);
}

void ForwardSums(const HostCall& call, const float* token, const ForwardIn& in, float* token_out) {
  auto sums = std::make_shared<std::vector<Message>>(call.config().num_nodes);
  auto look = [call, in, sums](std::vector<Message>& messages) -> std::optional<Fault> {
    const Config& config = call.config();
    const int32_t own_node = NodeOf(config, call.rank->rank);
    for (int32_t node = 0; node < config.num_nodes; ++node) {
      if (node == own_node) continue;
      const Message& first = messages[RankAt(config, node, 0)];
      const Matrix matrix{config.dtype, first.header().row_bytes / ElementBytes(config.dtype)};
      Result<Message> sum =
          SumWithinNode(config, {call.rank->rank, node}, KindOf(call.op), matrix,
                        RailRows(config, node, in.node_topk), messages, call.rank->pool.Take());
      if (const Fault* fault = FaultOf(sum)) return *fault;
      (*sums)[node] = std::get<Message>(std::move(sum));
    }
    return std::nullopt;
  };
  auto pack = [call, sums](const std::vector<Message>&, const Transport::Parcel& parcel) {
    return std::move((*sums)[NodeOf(call.config(), parcel.dst)]);
  };
  Forward(call, token, std::move(look), std::move(pack), token_out);
}

}  // namespace jax_sm_free
