// The rounds of an exchange. In one tier there is one round. In two tiers there are two: messages
// first come to the ranks that forward them, and then to the ranks that receive them.
//
// A message is named by its destination and by a number, which is a rank. The rank that hands it
// over is its carrier. Let the destination be the rank at (n, p): place p of node n. These messages
// come to it:
//
//             number                       carrier              what the message has
//   kDirect   every rank r                 r                    rows of r
//   kRail     (m, p) for each m != n       (m, p)               the rail message of (m, p)
//   kSpread   (m, q) for each m and q      (n, q)               rows of (m, q)
//   kGather   (m, q) for each m != n, q    (n, q)               sums of (n, q) for (m, p)
//   kHome     (n, q) for each q            (n, q)               sums of (n, q)
//             (m, p) for each m != n       (m, p)               sums of node m

#ifndef JAX_SM_FREE_CC_CPU_HOP_H_
#define JAX_SM_FREE_CC_CPU_HOP_H_

#include <cstdint>

#include "cc/config.h"
#include "cc/layout.h"
#include "cc/tiers.h"

namespace jax_sm_free {

enum class Hop : int32_t { kDirect, kRail, kSpread, kGather, kHome };
inline constexpr int32_t kNumHops = 5;

// Whether the exchange brings rows to experts. Otherwise it brings sums back to tokens.
constexpr bool BringsRows(Kind kind) {
  return kind == Kind::kDispatch || kind == Kind::kCombineBackward;
}

// The round whose messages a forward takes.
constexpr Hop FirstHop(Kind kind) { return BringsRows(kind) ? Hop::kRail : Hop::kGather; }

// The round whose messages a recv takes.
constexpr Hop LastHop(const Config& config, Kind kind) {
  if (!config.has_two_tiers()) return Hop::kDirect;
  return BringsRows(kind) ? Hop::kSpread : Hop::kHome;
}

// Whether a message with this number comes to `dst`.
constexpr bool Comes(const Config& config, Hop hop, int32_t number, int32_t dst) {
  const bool own_node = NodeOf(config, number) == NodeOf(config, dst);
  const bool on_rail = PlaceInNode(config, number) == PlaceInNode(config, dst);
  switch (hop) {
    case Hop::kRail:
      return !own_node && on_rail;
    case Hop::kGather:
      return !own_node;
    case Hop::kHome:
      return own_node || on_rail;
    case Hop::kDirect:
    case Hop::kSpread:
      break;
  }
  return true;
}

// How many messages come to each rank.
constexpr int32_t NumMessages(const Config& config, Hop hop) {
  const int32_t num_others = config.num_nodes - 1;
  switch (hop) {
    case Hop::kRail:
      return num_others;
    case Hop::kGather:
      return num_others * config.node_size();
    case Hop::kHome:
      return config.node_size() + num_others;
    case Hop::kDirect:
    case Hop::kSpread:
      break;
  }
  return config.ep_size;
}

// Whether a rank carries several messages to each rank, one for each node. In other rounds, it
// carries one.
constexpr bool CarriesForOthers(Hop hop) { return hop == Hop::kSpread || hop == Hop::kGather; }

// How many ranks carry messages to each rank.
constexpr int32_t NumCarriers(const Config& config, Hop hop) {
  return CarriesForOthers(hop) ? config.node_size() : NumMessages(config, hop);
}

constexpr int32_t CarrierOf(const Config& config, Hop hop, int32_t number, int32_t dst) {
  if (!CarriesForOthers(hop)) return number;
  return RankAt(config, NodeOf(config, dst), PlaceInNode(config, number));
}

// How much longer a recv of two tiers waits than its forward. A rank that is silent keeps others
// from forwarding, and these keep further ones from receiving. Of all these waits, those of the
// forwards end first, so that the fault names the rank that is silent.
inline constexpr double kRecvWaitsLongerSeconds = 0.5;

// How long a receiver waits for the messages of a round.
constexpr double TimeoutOf(const Config& config, Hop hop) {
  const bool is_behind_forward = hop == Hop::kSpread || hop == Hop::kHome;
  return config.timeout_s + (is_behind_forward ? kRecvWaitsLongerSeconds : 0.0);
}

// The configuration whose layout a message has.
constexpr Config ConfigOf(const Config& config, Hop hop) {
  return hop == Hop::kRail ? RailConfig(config) : config;
}

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_HOP_H_
