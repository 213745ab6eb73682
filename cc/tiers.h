// Nodes, and what travels between them. All functions are plain arithmetic, which host and device
// code share.
//
// In a group of two tiers, `num_nodes` nodes have `node_size` ranks each. A rank is named by its
// node and by its place within the node. The rail of a rank is the set of ranks that have the same
// place on all nodes. Only ranks of one rail exchange messages between nodes:
//
//   dispatch   send     own node: the flat message to each rank. Other nodes: a rail message to the
//                       rail peer there, with one row for each token that has an expert on the
//                       node.
//              forward  makes from a rail message the flat messages of its source to each rank
//              here. recv     has the flat messages of all ranks, as in one tier.
//   combine    send     makes the flat message to each rank, and hands it to the rank of this node
//                       that is on the rail of its destination.
//              forward  sums the messages of this node for a rail peer: one row for each row of the
//                       rail message of the dispatch.
//              recv     sums the messages of its own node likewise, and then adds up the nodes.
//
// The gradient of a combine goes the way of a dispatch, without routing. The gradient of a dispatch
// goes the way of a combine. The rounds in which these messages travel are in cc/cpu/hop.h.
//
// A rail message has the layout of a dispatch message of RailConfig. The experts of a node are
// numbered by the place of their rank, and then as on that rank: node experts.

#ifndef JAX_SM_FREE_CC_TIERS_H_
#define JAX_SM_FREE_CC_TIERS_H_

#include <cstdint>

#include "cc/config.h"
#include "cc/layout.h"
#include "cc/routing.h"

namespace jax_sm_free {

constexpr int32_t NodeOf(const Config& config, int32_t rank) {
  return rank / config.node_stride % config.num_nodes;
}

// The place of a rank within its node.
constexpr int32_t PlaceInNode(const Config& config, int32_t rank) {
  const int32_t stride = config.node_stride;
  return rank / (stride * config.num_nodes) * stride + rank % stride;
}

constexpr int32_t RankAt(const Config& config, int32_t node, int32_t place) {
  const int32_t stride = config.node_stride;
  return place / stride * (stride * config.num_nodes) + node * stride + place % stride;
}

// The number of an expert among the experts of all nodes, if they are sorted by node, then by node
// expert.
constexpr int32_t SortedByNode(const Config& config, int32_t expert) {
  const int32_t num_local = config.num_local_experts();
  const int32_t owner = OwnerRank(expert, num_local);
  const int32_t node_experts = config.node_size() * num_local;
  return NodeOf(config, owner) * node_experts + PlaceInNode(config, owner) * num_local +
         LocalExpert(expert, num_local);
}

// An exchange between nodes: its ranks are the nodes, and their experts are the node experts.
constexpr Config RailConfig(const Config& config) {
  Config rail = config;
  rail.ep_size = config.num_nodes;
  rail.num_nodes = 1;
  rail.node_stride = 1;
  return rail;
}

// An exchange within a node: its ranks are the places, and its experts are the node experts.
constexpr Config NodeConfig(const Config& config) {
  Config node = config;
  node.ep_size = config.node_size();
  node.num_experts = config.num_experts / config.num_nodes;
  node.num_nodes = 1;
  node.node_stride = 1;
  return node;
}

// Bytes of the largest message between two ranks, in one tier or in two. A rail message counts rows
// for more experts than another message.
constexpr int64_t MaxMessageBytesOfTiers(const Config& config) {
  const int64_t flat = MaxMessageBytes(config);
  const int64_t rail = config.has_two_tiers() ? MaxMessageBytes(RailConfig(config)) : 0;
  return rail > flat ? rail : flat;
}

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_TIERS_H_
