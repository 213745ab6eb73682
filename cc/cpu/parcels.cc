#include "cc/cpu/parcels.h"

#include "cc/tiers.h"

namespace jax_sm_free {
namespace {

// Calls fn(node, place) for all ranks, in the order of nodes and places behind this rank.
template <typename Fn>
void ForEachBehind(const Config& config, int32_t rank, const Fn& fn) {
  const int32_t node_size = config.node_size();
  for (int32_t i = 0; i < config.ep_size; ++i) {
    const int32_t node = (NodeOf(config, rank) + 1 + i / node_size) % config.num_nodes;
    const int32_t place = (PlaceInNode(config, rank) + 1 + i) % node_size;
    fn(node, place);
  }
}

}  // namespace

Parcels ParcelsOfSend(const Config& config, Hop hop, int32_t rank) {
  const int32_t own_node = NodeOf(config, rank);
  const int32_t own_place = PlaceInNode(config, rank);
  Parcels parcels;
  ForEachBehind(config, rank, [&](int32_t node, int32_t place) {
    const bool is_own_node = node == own_node;
    switch (hop) {
      case Hop::kDirect:
        return parcels.push_back({rank, RankAt(config, node, place)});
      case Hop::kRail:
        if (!is_own_node && place == own_place) {
          parcels.push_back({rank, RankAt(config, node, place)});
        }
        return;
      case Hop::kGather:
        if (!is_own_node) {
          parcels.push_back({RankAt(config, node, own_place), RankAt(config, own_node, place)});
        }
        return;
      case Hop::kSpread:
      case Hop::kHome:
        if (is_own_node) parcels.push_back({rank, RankAt(config, node, place)});
    }
  });
  return parcels;
}

Parcels ParcelsOfForward(const Config& config, Hop hop, int32_t rank) {
  const int32_t own_node = NodeOf(config, rank);
  const int32_t own_place = PlaceInNode(config, rank);
  Parcels parcels;
  ForEachBehind(config, rank, [&](int32_t node, int32_t place) {
    if (node == own_node) return;
    if (hop == Hop::kSpread) {
      parcels.push_back({RankAt(config, node, own_place), RankAt(config, own_node, place)});
    } else if (place == own_place) {
      parcels.push_back({rank, RankAt(config, node, place)});
    }
  });
  return parcels;
}

}  // namespace jax_sm_free
