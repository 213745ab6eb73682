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

// Makes a function that packs what goes on, from the messages that have come. They outlive it.
using MakePack = std::function<Result<Transport::Pack>(std::vector<Message>& messages)>;

// The common part of all forwards.
void Forward(const HostCall& call, const float* token, MakePack make_pack, float* token_out) {
  const Result<Exchange> taken = call.rank->ledger.Forward(call.op, token);
  if (const Fault* fault = FaultOf(taken)) return call.done(Fail(call, call.run, *fault));
  const Exchange exchange = std::get<Exchange>(taken);
  auto send_on = [call, exchange, token_out, make_pack = std::move(make_pack)](
                     std::vector<Message>& messages) -> std::optional<Fault> {
    const Result<Transport::Pack> pack = make_pack(messages);
    if (const Fault* fault = FaultOf(pack)) return *fault;
    const Hop hop = LastHop(call.config(), exchange.kind);
    const Parcels parcels = ParcelsOfForward(call.config(), hop, call.rank->rank);
    auto fault = SendRound(call, exchange.key, hop, parcels, std::get<Transport::Pack>(pack), true);
    if (!fault) call.rank->ledger.WriteToken(exchange, token_out);
    return fault;
  };
  Await(call, exchange, std::move(send_on), [] {});
}

// Calls fn(node, number) for the rail message of each other node, until it returns a fault.
template <typename Fn>
std::optional<Fault> ForEachRail(const HostCall& call, const Fn& fn) {
  const Config& config = call.config();
  const int32_t rank = call.rank->rank;
  for (int32_t node = 0; node < config.num_nodes; ++node) {
    if (node == NodeOf(config, rank)) continue;
    if (auto fault = fn(node, RankAt(config, node, PlaceInNode(config, rank)))) return fault;
  }
  return std::nullopt;
}

// By number of a rail message: its rows that go to each place of this node.
using RailRoutes = std::vector<Route>;

// A fault (without op and rank) if the rows of a rail message are not those of `node_topk`.
Result<RailRoutes> RoutesOf(const HostCall& call, const int32_t* node_topk,
                            const std::vector<Message>& messages) {
  const Config& config = call.config();
  RailRoutes routes(config.ep_size);
  const auto find = [&](int32_t node, int32_t number) -> std::optional<Fault> {
    const Result<TopK> found = RailRows(config, node, node_topk);
    if (const Fault* fault = FaultOf(found)) return *fault;
    const auto& rows = std::get<TopK>(found);
    const Message& rail = messages[number];
    if (auto fault = CheckMessage(rail, number, rows.num_tokens, rail.header().row_bytes)) {
      return fault;
    }
    routes[number] = std::get<Route>(Route::Make(NodeConfig(config), rows));
    return std::nullopt;
  };
  if (auto fault = ForEachRail(call, find)) return *std::move(fault);
  return routes;
}

// Packs messages with `pack_rows(rail, rows, place)`, which has the rows of a rail message that go
// to a place.
template <typename PackRows>
Result<Transport::Pack> PackRails(const HostCall& call, const int32_t* node_topk,
                                  const std::vector<Message>& messages, const PackRows& pack_rows) {
  Result<RailRoutes> routes = RoutesOf(call, node_topk, messages);
  if (const Fault* fault = FaultOf(routes)) return *fault;
  return [&messages, pack_rows, config = call.config(),
          routes = std::get<RailRoutes>(std::move(routes))](const Transport::Parcel& parcel) {
    const int32_t place = PlaceInNode(config, parcel.dst);
    return pack_rows(messages[parcel.number], routes[parcel.number].tokens(place), place);
  };
}

}  // namespace

void DispatchForward(const HostCall& call, const float* token, const ForwardOut& out) {
  auto make_pack = [call, out](std::vector<Message>& messages) {
    WriteNodeTopK(call.config(), NodeOf(call.config(), call.rank->rank), nullptr, out.node_topk);
    (void)ForEachRail(call, [&](int32_t node, int32_t number) -> std::optional<Fault> {
      WriteNodeTopK(call.config(), node, &messages[number], out.node_topk);
      return std::nullopt;
    });
    const auto pack_rows = [call](const Message& rail, const std::vector<int32_t>& rows,
                                  int32_t place) {
      return ForwardDispatch(call.config(), rail, rows, place, call.rank->pool.Take());
    };
    return PackRails(call, out.node_topk, messages, pack_rows);
  };
  Forward(call, token, std::move(make_pack), out.token);
}

void CombineBackwardForward(const HostCall& call, const float* token, const ForwardIn& in,
                            float* token_out) {
  auto make_pack = [call, in](std::vector<Message>& messages) {
    const auto pack_rows = [call](const Message& rail, const std::vector<int32_t>& rows,
                                  int32_t /*place*/) {
      return ForwardRows(call.config(), rail, rows, call.rank->pool.Take());
    };
    return PackRails(call, in.node_topk, messages, pack_rows);
  };
  Forward(call, token, std::move(make_pack), token_out);
}

void ForwardSums(const HostCall& call, const float* token, const ForwardIn& in, float* token_out) {
  auto make_pack = [call, in](std::vector<Message>& messages) -> Result<Transport::Pack> {
    const Config& config = call.config();
    auto sums = std::make_shared<std::vector<Message>>(config.ep_size);  // by number
    const auto sum_up = [&](int32_t node, int32_t number) -> std::optional<Fault> {
      const int64_t row_bytes = messages[number].header().row_bytes;
      const Matrix matrix{config.dtype, row_bytes / ElementBytes(config.dtype)};
      const Result<TopK> rows = RailRows(config, node, in.node_topk);
      if (const Fault* fault = FaultOf(rows)) return *fault;
      Result<Message> sum = SumWithinNode(config, {call.rank->rank, node}, KindOf(call.op), matrix,
                                          std::get<TopK>(rows), messages, call.rank->pool.Take());
      if (const Fault* fault = FaultOf(sum)) return *fault;
      (*sums)[number] = std::get<Message>(std::move(sum));
      return std::nullopt;
    };
    if (auto fault = ForEachRail(call, sum_up)) return *std::move(fault);
    return [sums](const Transport::Parcel& parcel) { return std::move((*sums)[parcel.dst]); };
  };
  Forward(call, token, std::move(make_pack), token_out);
}

}  // namespace jax_sm_free
