// A rank as its kernels and its host threads see it: its memory, and the messages that it sends and
// gets.
//
// Messages are numbered. In one tier, message p of a rank goes to rank p, or comes from there. In
// two tiers (cc/tiers.h), rank (n, h), which is the one with place h on node n, has these:
//
//   RankAt(m, g)  goes to rank (n, g) of the own node, or comes from there. In the direction of a
//                 dispatch, node m is where its rows come from. In that of a combine, node m is
//                 where they go.
//   ep_size + i   goes to the rail peer (m, h), or comes from there. Node m is the i-th other node.
//
// On GPUs, rail messages have the layout of other messages: the number of rows for each expert
// travels in the notice of a message alone.
//
// The other end of a message has another number for it. In one tier, that is the rank of this end.

#ifndef JAX_SM_FREE_CC_CUDA_RANK_VIEW_H_
#define JAX_SM_FREE_CC_CUDA_RANK_VIEW_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "cc/config.h"
#include "cc/cuda/device_state.h"
#include "cc/tiers.h"

namespace jax_sm_free::cuda {

// The place of node `other` among the nodes other than `node`, and the i-th of these nodes.
constexpr int32_t AmongOthers(int32_t node, int32_t other) {
  return other - (other > node ? 1 : 0);
}
constexpr int32_t OtherNode(int32_t node, int32_t i) { return i + (i < node ? 0 : 1); }

// The i-th node up the ring of nodes from `node`, among the other nodes.
constexpr int32_t NextOther(const Config& config, int32_t node, int32_t i) {
  return (node + i) % (config.num_nodes - 1);
}

// The other end of a message.
struct OtherEnd {
  uint8_t rank;         // may be this rank itself
  uint8_t message;      // its number there
  uint8_t stage;        // where this rank packs what it sends as this message
  uint8_t stage_there;  // where `rank` packs what this rank gets as this message
};

// Where `rank` stages a message for another rank: messages for the ranks of the own node first, by
// the other node and then around the ring; then rail messages.
constexpr int32_t StageOf(const Config& config, int32_t rank, int32_t message) {
  const int32_t num_others = config.node_size() - 1;
  if (message >= config.ep_size) return config.num_nodes * num_others + message - config.ep_size;
  const int32_t distance = PlaceInNode(config, message) - PlaceInNode(config, rank) + num_others;
  return NodeOf(config, message) * num_others + distance % config.node_size();
}

constexpr OtherEnd OtherEndOf(const Config& config, int32_t rank, int32_t message) {
  const int32_t node = NodeOf(config, rank);
  const int32_t place = PlaceInNode(config, rank);
  int32_t end = 0;
  int32_t number = 0;
  if (message < config.ep_size) {
    end = RankAt(config, node, PlaceInNode(config, message));
    number = RankAt(config, NodeOf(config, message), place);
  } else {
    const int32_t other = OtherNode(node, message - config.ep_size);
    end = RankAt(config, other, place);
    number = config.ep_size + AmongOthers(other, node);
  }
  return {static_cast<uint8_t>(end), static_cast<uint8_t>(number),
          static_cast<uint8_t>(StageOf(config, rank, message)),
          static_cast<uint8_t>(StageOf(config, end, number))};
}

// The messages of a rank.
struct MessageTable {
  OtherEnd end[kMaxMessages];
  // The messages in which a send of token rows sends them, and a recv of sums gets them: those of
  // the ranks of the own node, by place, and then those of rail peers.
  int32_t num_lanes;
  uint8_t of_lane[kMaxRanks];

  // The orders of messages. In each, every rank starts with another rank. In one tier, ranks are in
  // a ring: a rank sends up the ring, and so gets messages from down the ring first. In two tiers,
  // nodes are in a ring, and so are the ranks of a node. Messages with the longest way go first.
  uint8_t rows_sent[kMaxRanks];      // those of all lanes, this rank's own message last
  uint8_t sums_sent[kMaxRanks];      // those with sums for each rank, this rank's own last
  uint8_t rows_received[kMaxRanks];  // those with rows of each rank, this rank's own first
};

constexpr MessageTable MessagesOf(const Config& config, int32_t rank) {
  MessageTable table{};
  for (int32_t i = 0; i < NumMessages(config); ++i) table.end[i] = OtherEndOf(config, rank, i);
  table.num_lanes = NumLanes(config);
  const int32_t size = config.node_size();
  const int32_t num_others = config.num_nodes - 1;
  const int32_t node = NodeOf(config, rank);
  const int32_t place = PlaceInNode(config, rank);
  for (int32_t i = 0; i < num_others; ++i) {
    const int32_t next = NextOther(config, node, i);
    table.of_lane[size + i] = static_cast<uint8_t>(config.ep_size + i);
    table.rows_sent[i] = static_cast<uint8_t>(config.ep_size + next);
  }
  for (int32_t i = 0; i < size; ++i) {
    const int32_t above = (place + 1 + i) % size;
    const int32_t below = (place + size - i) % size;
    table.of_lane[i] = static_cast<uint8_t>(RankAt(config, node, i));
    table.rows_sent[num_others + i] = static_cast<uint8_t>(RankAt(config, node, above));
    for (int32_t n = 0; n < config.num_nodes; ++n) {
      const bool is_own = n == num_others;
      const int32_t upwards = is_own ? node : OtherNode(node, NextOther(config, node, n));
      const int32_t downwards = (node + config.num_nodes - n) % config.num_nodes;
      table.sums_sent[n * size + i] = static_cast<uint8_t>(RankAt(config, upwards, above));
      table.rows_received[n * size + i] = static_cast<uint8_t>(RankAt(config, downwards, below));
    }
  }
  return table;
}

// All that a kernel needs of its rank, passed by value.
struct RankView {
  Config config;
  RegionLayout regions;
  int64_t buffer_id;
  int32_t rank;
  int32_t position;
  int32_t tile_tokens;         // TileTokens(config)
  std::byte* base[kMaxRanks];  // the region of each rank; base[rank] is local
  MessageTable messages;
  DeviceState* state;
  MailboxEntry* mailbox;
  Status* status;

  // For each slot, from a dispatch's send to its recv: our own rows are not packed.
  int32_t* own_token;  // [num_slots, max_tokens]: token of each row in the message to ourselves

  // Scratch, valid within one op.
  int32_t* row_of;         // [max_tokens, lanes]: row of a token in the message of a lane, or -1
  int32_t* tile_counts;    // [tiles + 1, keys]: first place of each key in each tile; totals
  int32_t* common_before;  // [max_tokens]: CommonBefore::number of each token
  int64_t* group_row;   // [ep_size, num_local_experts]: first expert row of a (source, expert) run
  int64_t* group_end;   // [num_local_experts]: end of the rows kept
  int64_t* group_next;  // [num_local_experts]: end of the group, padding included
  uint8_t* covered;     // [max(recv_capacity, max_recv_tokens)]: rows that the layout names
};

// The part of a view that follows from its group.
constexpr RankView ViewOf(const Config& config, int32_t rank) {
  RankView view{};
  view.config = config;
  view.regions = RegionsOf(config);
  view.rank = rank;
  view.tile_tokens = TileTokens(config);
  view.messages = MessagesOf(config, rank);
  return view;
}

// The keys of a tile.
constexpr int32_t NumKeys(const RankView& view) {
  return view.config.num_experts + view.messages.num_lanes + 1;
}

// The entry of a message in the tables of a region.
constexpr int64_t MessageIndex(const RankView& view, int32_t slot, int32_t message) {
  return slot * view.regions.num_messages + message;
}

// Where a rank packs a message for another rank, from the start of the rank's region.
constexpr int64_t StageOffset(const RankView& view, int32_t slot, int32_t stage) {
  const int64_t num_staged = view.config.ep_size - 1;
  return view.regions.stage + (slot * num_staged + stage) * view.regions.message_bytes;
}

// What an order copies: bytes that lie together.
struct Piece {
  int64_t source;  // from the start of the sender's region
  int64_t begin;   // within the message
  int64_t bytes;   // may be 0
};
constexpr std::array<Piece, 2> PiecesOf(const RankView& view, const CopyOrder& order) {
  const int64_t stage = StageOffset(view, order.slot, view.messages.end[order.message].stage);
  const bool together = order.common_at == stage + order.common;
  const int64_t common = together ? order.end : order.common;
  return {{{stage + order.begin, order.begin, common - order.begin},
           {order.common_at, common, order.end - common}}};
}

// Where an order copies to, from the starts of regions: its message, and the signal of the message.
struct Target {
  int32_t rank;
  int64_t message;
  int64_t signal;
};
constexpr Target TargetOf(const RankView& view, const CopyOrder& order) {
  const OtherEnd& end = view.messages.end[order.message];
  const int64_t index = MessageIndex(view, order.slot, end.message);
  return {end.rank, view.regions.recv + index * view.regions.message_bytes,
          view.regions.signals + index * int64_t{sizeof(uint64_t)}};
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_RANK_VIEW_H_
