#include "cc/cpu/ops.h"

#include <utility>

#include "cc/cpu/exchange.h"
#include "cc/cpu/forward.h"
#include "cc/cpu/hop.h"
#include "cc/cpu/numeric.h"
#include "cc/cpu/pack.h"
#include "cc/cpu/parcels.h"
#include "cc/cpu/reduce.h"
#include "cc/cpu/unpack.h"
#include "cc/cpu/wire_rows.h"
#include "cc/fault_texts.h"
#include "cc/tiers.h"

namespace jax_sm_free {
namespace {

// Makes the message of a parcel in a round.
using PackHop = std::function<Message(Hop hop, const Transport::Parcel& parcel)>;

// Opens an exchange, sends all messages of the send, and writes the token. In two tiers, what other
// ranks forward goes first.
std::optional<Fault> SendAll(const HostCall& call, const PackHop& pack, float* token) {
  HostRank& rank = *call.rank;
  const Config& config = call.config();
  const Result<Exchange> begun = rank.ledger.Begin(call.op, call.run, call.call_site);
  if (const Fault* fault = FaultOf(begun)) {
    for (const int64_t lost : rank.ledger.TakeLostRuns()) Fail(call, lost, *fault);
    return Fail(call, call.run, *fault);
  }
  const auto& exchange = std::get<Exchange>(begun);
  if (auto fault = rank.transport->Begin(call.op, exchange, rank.member, call.site)) return fault;
  const Hop last = LastHop(config, exchange.kind);
  const Hop first = config.has_two_tiers() ? FirstHop(exchange.kind) : last;
  for (const Hop hop : {first, last}) {
    const auto pack_here = [&](const Transport::Parcel& parcel) { return pack(hop, parcel); };
    const Parcels parcels = ParcelsOfSend(config, hop, rank.rank);
    if (auto fault = SendRound(call, exchange.key, hop, parcels, pack_here, hop == first)) {
      return fault;
    }
    if (first == last) break;
  }
  rank.ledger.WriteToken(exchange, token);
  return std::nullopt;
}

// The tokens that go to each rank, and in two tiers those that go to each node.
struct Routes {
  Route flat;
  std::vector<int32_t> sorted_idx;  // topk_idx, sorted by node
  Route rail;

  static Result<Routes> Make(const Config& config, const TopK& topk) {
    Result<Route> flat = Route::Make(config, topk);
    if (const Fault* fault = FaultOf(flat)) return *fault;
    Routes routes{.flat = std::get<Route>(std::move(flat)), .sorted_idx = {}, .rail = {}};
    if (!config.has_two_tiers()) return routes;
    routes.sorted_idx = SortByNode(config, topk);
    const TopK sorted{routes.sorted_idx.data(), topk.weights, topk.num_tokens};
    routes.rail = std::get<Route>(Route::Make(RailConfig(config), sorted));
    return routes;
  }
};

// Sends token rows to the ranks of their experts. `pack_rows(config, tokens, topk, dst)` makes the
// message of these tokens. In a rail message, the nodes stand for ranks.
template <typename PackRows>
std::optional<Fault> SendRows(const HostCall& call, const TopK& topk, const PackRows& pack_rows,
                              float* token) {
  const Config& config = call.config();
  const Result<Routes> made = Routes::Make(config, topk);
  if (const Fault* fault = FaultOf(made)) return Fail(call, call.run, *fault);
  const auto& routes = std::get<Routes>(made);
  const auto pack = [&](Hop hop, const Transport::Parcel& parcel) {
    if (hop != Hop::kRail) {
      return pack_rows(config, routes.flat.tokens(parcel.dst), topk, parcel.dst);
    }
    const int32_t node = NodeOf(config, parcel.dst);
    const TopK sorted{routes.sorted_idx.data(), topk.weights, topk.num_tokens};
    return pack_rows(RailConfig(config), routes.rail.tokens(node), sorted, node);
  };
  return SendAll(call, pack, token);
}

// The sums of a recv in two tiers: first over the ranks of this node, then over nodes.
std::optional<Fault> SumOverNodes(const HostCall& call, const SumsOut& out,
                                  std::vector<Message>& messages) {
  const Config& config = call.config();
  const int32_t own_node = NodeOf(config, call.rank->rank);
  const int32_t own_place = PlaceInNode(config, call.rank->rank);
  const Result<std::vector<int32_t>> routing = RoutingOnNode(config, own_node, out.topk);
  if (const Fault* fault = FaultOf(routing)) return *fault;
  const auto& own = std::get<std::vector<int32_t>>(routing);
  const TopK own_rows{own.data(), nullptr, static_cast<int64_t>(own.size()) / config.top_k};
  Result<Message> sum = SumWithinNode(config, {call.rank->rank, own_node}, KindOf(call.op),
                                      out.matrix, own_rows, messages, call.rank->pool.Take());
  if (Fault* fault = std::get_if<Fault>(&sum)) return *fault;
  std::vector<Message> by_node;
  by_node.reserve(config.num_nodes);
  for (int32_t node = 0; node < config.num_nodes; ++node) {
    by_node.push_back(std::move(node == own_node ? std::get<Message>(sum)
                                                 : messages[RankAt(config, node, own_place)]));
  }
  const std::vector<int32_t> sorted = SortByNode(config, out.topk);
  const TopK topk{sorted.data(), nullptr, out.topk.num_tokens};
  std::optional<Fault> fault = SumOverRanks(RailConfig(config), out.matrix, topk, by_node,
                                            {out.sums, out.matrix.row_bytes()}, out.weight_grads);
  if (fault && fault->peer >= 0) fault->peer = RankAt(config, fault->peer, own_place);
  return fault;
}

}  // namespace

std::optional<Fault> DispatchSend(const HostCall& call, const DispatchSendIn& in, float* token) {
  if (*in.position != call.rank->position) {
    return Fail(call, call.run, PositionDiffers(call.rank->position, *in.position));
  }
  const WireRows rows(in.format, in.rows, in.topk.num_tokens);
  const auto pack = [&](const Config& config, const auto& tokens, const TopK& topk, int32_t dst) {
    return PackDispatch(config, tokens, topk, dst, rows.rows(), call.rank->pool.Take());
  };
  return SendRows(call, in.topk, pack, token);
}

std::optional<Fault> CombineBackwardSend(const HostCall& call, const RowsIn& in, float* token) {
  const auto pack = [&](const Config& config, const auto& tokens, const TopK&, int32_t /*dst*/) {
    return PackRows(config, KindOf(call.op), tokens, in.rows, call.rank->pool.Take());
  };
  return SendRows(call, in.topk, pack, token);
}

std::optional<Fault> SendSums(const HostCall& call, const SumsIn& in, float* token) {
  if (auto fault = Check(call.config(), in.rows.layout)) return Fail(call, call.run, *fault);
  std::vector<Message> messages =
      PackSums(call.config(), KindOf(call.op), in.matrix, in.rows.y, in.rows.weights,
               in.weight_grads, in.rows.layout, call.rank->pool);
  const auto pack = [&](Hop hop, const Transport::Parcel& parcel) {
    // Another rank of this node forwards what is for its rail peer on the node of `number`.
    const Config& config = call.config();
    const int32_t node = NodeOf(config, hop == Hop::kGather ? parcel.number : parcel.dst);
    return std::move(messages[RankAt(config, node, PlaceInNode(config, parcel.dst))]);
  };
  return SendAll(call, pack, token);
}

void Receive(const HostCall& call, const float* token, Unpack unpack) {
  const Result<Exchange> finished = call.rank->ledger.Finish(call.op, token);
  if (const Fault* fault = FaultOf(finished)) return call.done(Fail(call, call.run, *fault));
  const Exchange exchange = std::get<Exchange>(finished);
  auto then = [call, exchange, unpack = std::move(unpack)](std::vector<Message>& messages) {
    call.rank->counters.CountExchange(exchange.kind);
    return unpack(call.config(), messages);
  };
  Await(call, exchange, std::move(then), [call, exchange] { call.rank->ledger.Release(exchange); });
}

void DispatchRecv(const HostCall& call, const float* token, const OwnRows& /*own*/,
                  const ExpertsOut& out) {
  // `receive` in Receive holds the rank as long as this function exists.
  Receive(call, token,
          [rank = call.rank, out](const Config& config, std::vector<Message>& messages) {
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
  Receive(call, token, [call, out](const Config& config, std::vector<Message>& messages) {
    if (config.has_two_tiers()) return SumOverNodes(call, out, messages);
    return SumOverRanks(config, out.matrix, out.topk, messages, {out.sums, out.matrix.row_bytes()},
                        out.weight_grads);
  });
}

void CombineBackwardRecv(const HostCall& call, const float* token, const SpreadOut& out) {
  Receive(call, token, [out](const Config& config, const std::vector<Message>& messages) {
    return SpreadGradients(config, out.matrix, messages, out.rows.layout, out.rows.y,
                           out.rows.weights, out.y_grad, out.weight_grads);
  });
}

}  // namespace jax_sm_free
