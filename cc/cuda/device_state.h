// What lives in device memory and in pinned memory, as kernels and the host both see it.
//
// Every rank holds one region with the same byte offsets (RegionLayout), so that a kernel or a copy
// finds the same place on another rank by that rank's base address:
//
//   signals  u64 [num_slots, messages]  kNumParts times the sequence number whose message is
//            there, plus the part of it that came last
//   acks     u64 [num_slots, messages]  from each destination, by rank: the last one it has read
//            from this slot
//   noticed  u64 [num_slots, messages]  the last one whose notice is there
//   posted   u64 [num_slots, messages]  the signal that the message will have here, as soon as it
//            is packed there
//   notices  [num_slots, messages] headers and rows per expert
//   recv     [num_slots, messages] messages
//   stage    [num_slots, ep_size - 1] messages for other ranks; common rows in the first alone
//
// The messages of a rank are numbered (rank_view.h). In one tier, there is one from each rank.
//
// An exchange takes the first free slot, counted from its sequence number on, so that a slot rests
// while its peers read it: the same one on all ranks, because all issue the same calls in the same
// order. A slot of this rank goes through
//
//          begin (send)            wait (recv)               unpacked (recv)
//   free ---------------> sent ----------------> receiving ----------------> free
//                          |                       ^
//                          |  wait (forward)       |  wait (recv)       two tiers only
//                          +-----------------> forwarded
//
// `begin` waits until every destination has acknowledged the exchange that used the slot before:
// then its part of `recv` may be overwritten, and so may `stage`, for what was read has left, or
// was read there. A recv reads a message in its sender's `stage` when it was posted and no copy of
// it comes: the CUDA driver lets no thread enqueue anything while it loads a module or frees
// memory, for which it first waits until the GPU has run dry, and with it for this recv. A copy
// that is issued late writes what nobody reads: readers wait for a later signal of the same stream.

#ifndef JAX_SM_FREE_CC_CUDA_DEVICE_STATE_H_
#define JAX_SM_FREE_CC_CUDA_DEVICE_STATE_H_

#include <cstddef>
#include <cstdint>

#include "cc/config.h"
#include "cc/layout.h"
#include "cc/op.h"
#include "cc/routing.h"
#include "cc/token.h"

namespace jax_sm_free::cuda {

inline constexpr int kMaxRanks = 32;  // with peer access to each other; one lane of a warp each
inline constexpr int kMaxSlots = 64;
inline constexpr int kMailboxEntries =
    8192;  // more than can be on their way: slots x ranks x parts

// A dispatch's messages leave in parts, so that the first is on its way while the second is packed,
// and is unpacked while the second is on its way. So do those of a combine's gradient, and the
// first one of a combine. Small messages and others are one part, the last.
inline constexpr int kNumParts = 2;
inline constexpr int kLastPart = kNumParts - 1;

// Routing cuts the tokens into tiles of at most this many (token, k), a block and a histogram each.
inline constexpr int kTileEntries = 512;

// Messages of a rank in a slot: one with each rank, and one with each rail peer on another node.
inline constexpr int kMaxMessages = 2 * kMaxRanks - 1;
constexpr int32_t NumMessages(const Config& config) {
  return config.ep_size + config.num_nodes - 1;
}

// Destinations of token rows: in one tier all ranks; in two tiers the ranks of the own node, and
// the rail peers. A lane of a warp handles each.
constexpr int32_t NumLanes(const Config& config) {
  return config.node_size() + config.num_nodes - 1;
}

// A tile counts its entries by expert, its token rows by destination, and its common tokens.
constexpr int32_t NumKeys(const Config& config) {
  return config.num_experts + NumLanes(config) + 1;
}

// Warps of a tile's block: fewer where a histogram for each would not fit shared memory.
constexpr int32_t TileWarps(const Config& config) {
  constexpr int32_t kHistogramBytes = 160 * 1024;
  const int32_t fit = kHistogramBytes / (NumKeys(config) * static_cast<int32_t>(sizeof(int32_t)));
  const int32_t most = kTileEntries / 32;
  return fit < 1 ? 1 : fit > most ? most : fit;
}
constexpr int32_t TileTokens(const Config& config) { return TileWarps(config) * 32 / config.top_k; }
constexpr int64_t MaxTiles(const Config& config) {
  return (config.max_tokens + int64_t{TileTokens(config)} - 1) / TileTokens(config);
}

// Of a kernel: a message for each other rank, the first in parts.
inline constexpr int kMaxSteps = kMaxRanks + kNumParts - 2;

struct RegionLayout {
  int64_t num_messages = 0;  // of a slot
  int64_t signals = 0;
  int64_t acks = 0;
  int64_t noticed = 0;
  int64_t posted = 0;
  int64_t notices = 0;
  int64_t recv = 0;
  int64_t stage = 0;
  int64_t notice_bytes = 0;   // from one notice to the next
  int64_t message_bytes = 0;  // from one message to the next
  int64_t total = 0;
};

constexpr RegionLayout RegionsOf(const Config& config) {
  constexpr int64_t kPage = 4096;
  RegionLayout regions;
  regions.num_messages = NumMessages(config);
  const int64_t num_messages = config.num_slots * regions.num_messages;
  // The notice of a rail message counts rows for all experts of a node.
  const int64_t ranks_counted = config.has_two_tiers() ? config.node_size() : 1;
  regions.message_bytes = RoundUp(MaxMessageBytes(config), kPage);
  regions.notice_bytes =
      int64_t{sizeof(MessageHeader)} +
      RoundUp(ranks_counted * config.num_local_experts() * int64_t{4}, kPartAlignment);
  regions.acks = RoundUp(num_messages * 8, kPage);
  regions.noticed = 2 * regions.acks;
  regions.posted = 3 * regions.acks;
  regions.notices = 4 * regions.acks;
  regions.recv = regions.notices + RoundUp(num_messages * regions.notice_bytes, kPage);
  regions.stage = regions.recv + num_messages * regions.message_bytes;
  regions.total =
      regions.stage + int64_t{config.num_slots} * (config.ep_size - 1) * regions.message_bytes;
  return regions;
}

// What went wrong, as numbers; the host turns it into a Fault.
enum class FaultCode : int32_t {
  kNone,
  kTimeout,     // detail: bit s, source s is missing; seen: the last sequence number of the peer
  kAckTimeout,  // expected, seen: sequence number
  kSlots,
  kToken,         // seen: the magic word, as bits
  kTokenUsed,     // seen: sequence number
  kTokenOrigin,   // seen: rank; detail: buffer
  kTokenKind,     // expected, seen: Kind
  kNotForwarded,  // seen: sequence number
  kIndex,         // seen: the index; detail: token * top_k + k
  kPosition,      // expected, seen: position in the mesh
  kLayout,        // expected: bound; seen: a row
  kLayoutCount,   // seen: a count of rows
  kMessageKind,   // expected, seen: Kind
  kOutOfStep,     // expected, seen: bytes of a row; detail: rows expected << 32 | rows seen
  kPeer,          // the peer's own fault poisoned its message
  kStopped,       // the host ended the wait
};

struct FaultRecord {
  int32_t code;  // FaultCode, written last
  int32_t op;    // Op
  int32_t peer;
  int32_t slot;
  int32_t claimed;
  int64_t sequence;
  int64_t expected;
  int64_t seen;
  int64_t detail;
};

// In pinned host memory.
struct Status {
  int32_t stopped;        // the host's only word: waits end soon
  FaultRecord fault;      // the first; it stays
  FaultRecord slow_wait;  // one that goes on after kSlowWaitSeconds, until the host has told it
};

// A copy to issue: bytes [begin, end) of a message in `slot`, and the signal behind it. Those from
// `common` on lie from common_at on in the sender's region.
struct CopyOrder {
  int32_t message;  // its number
  int32_t slot;
  int64_t begin;
  int64_t end;
  int64_t common;
  int64_t common_at;
  uint64_t signal;
};

// An order in the mailbox, in words of 32 bits, each below the order's number (from 1) in one
// 64-bit store: so the host knows a whole order when it sees one. A fence between the order and a
// flag would do too, but one that reaches the host takes long beside kernels that write at full
// speed.
struct MailboxEntry {
  static constexpr int kWords = sizeof(CopyOrder) / sizeof(uint32_t);
  uint64_t words[kWords];
};

constexpr uint64_t SignalOf(uint64_t sequence, int part) { return sequence * kNumParts + part; }

// Whether rows go sooner in parts: a copy more, or a launch that unpacks a part, costs some 5 us.
constexpr bool GoInParts(int64_t num_rows, int64_t row_bytes) {
  constexpr int64_t kLeastBytes = int64_t{4} << 20;
  return num_rows * row_bytes >= kLeastBytes;
}

// Tokens of the first part: half of them, in whole tiles; 0 where messages leave whole.
constexpr int64_t FirstPartTokens(int32_t tile_tokens, int64_t num_tokens, int64_t row_bytes) {
  if (!GoInParts(num_tokens, row_bytes)) return 0;
  const int64_t half = RoundUp((num_tokens + 1) / 2, tile_tokens);
  return half < num_tokens ? half : 0;
}

// Rows of the first part of a combine's first message; 0 if it leaves whole. With a part f of them,
// the wire begins after f of the time that the message takes to sum, S, and is never idle if that
// part travels until the rest is summed: f S + f W >= S, where W is the time of the message on the
// wire. W was 1.6 S on 2 H200s and 2.5 S on 4, so that f is 0.38 and 0.29.
constexpr int32_t FirstPartRows(int32_t num_rows, int64_t row_bytes) {
  return GoInParts(num_rows, row_bytes) ? static_cast<int32_t>(int64_t{num_rows} * 3 / 8) : 0;
}

// Whether a dispatch stages the rows of its common tokens, which go to all other ranks, once for
// all of them. What SMs write is less; for each part and destination there is a copy more, of some
// 2 us.
constexpr bool StagesOnce(const Config& config, int64_t num_common, int64_t num_tokens) {
  return config.ep_size > 2 && num_common > 0 && 2 * num_common >= num_tokens;
}

// How the rows of a message lie, from its header: in each part the common ones last.
struct Placing {
  int32_t num_rows;
  int32_t first_part;
  int32_t num_common;
  int32_t first_common;

  // Places of the common rows of a part; they have the same order in all messages.
  constexpr int32_t common_begin(int part) const {
    return part == kLastPart ? num_rows - num_common + first_common : first_part - first_common;
  }
  constexpr int32_t common_end(int part) const { return part == kLastPart ? num_rows : first_part; }
};
constexpr Placing PlacingOf(const MessageHeader& header) {
  return {header.num_rows, static_cast<int32_t>(header.first_part), header.num_common,
          header.first_common};
}

// How many common tokens there are ahead of a token, and whether it is one itself: in one number,
// ~count if it is.
struct CommonBefore {
  int32_t count;
  bool is_one;

  static constexpr CommonBefore Of(int32_t number) {
    return number < 0 ? CommonBefore{~number, true} : CommonBefore{number, false};
  }
  constexpr int32_t number() const { return is_one ? ~count : count; }
};

// The place of a row, by its number in order of tokens.
constexpr int32_t PlaceOf(const Placing& placing, int32_t number, const CommonBefore& common) {
  if (placing.num_common == 0) return number;
  const bool first = number < placing.first_part;
  if (!common.is_one) return number - common.count + (first ? 0 : placing.first_common);
  return first ? placing.common_begin(0) + common.count
               : placing.common_begin(kLastPart) + common.count - placing.first_common;
}

// The place of the same row in another message of the send; -1 for one that is not common.
constexpr int32_t PlaceInOther(const Placing& placing, int32_t place, const Placing& other) {
  const int part = place < placing.first_part ? 0 : kLastPart;
  const int32_t in_common = place - placing.common_begin(part);
  return in_common < 0 ? -1 : other.common_begin(part) + in_common;
}

// One exchange while the kernels of one op pass it on.
struct Current {
  uint64_t sequence;
  int32_t slot;
  int32_t failed;               // then messages are empty and results are poisoned
  unsigned long long in_place;  // bit m: message m is read where it was packed; for atomicOr
};

// Warps of a grid fall into so many groups, each with a counter in a sector of memory of its own.
inline constexpr int kClaimGroups = 128;
struct alignas(32) ClaimCounter {
  uint32_t claimed;
};

// What RankStats has, of one rank. Its own kernels alone add to it, by atomics whose results nobody
// waits for.
struct Counters {
  using Counter = unsigned long long;  // the type that atomicAdd takes

  Counter exchanges[kNumKinds];
  Counter rows_dropped;
  Counter bytes_sent[kMaxRanks];
  Counter bytes_received[kMaxRanks];
  Counter waited_ns[kMaxRanks];
};

// In device memory, one for each rank.
struct DeviceState {
  uint64_t sequence;                // of the last send
  unsigned long long mailbox_head;  // entries posted; the type that atomicAdd takes
  Current current;
  int32_t faulted;  // Faulted
  uint64_t slot_sequence[kMaxSlots];
  int32_t slot_phase[kMaxSlots];   // SlotPhase
  uint32_t blocks_done;            // of the running kernel
  uint32_t steps_done[kMaxSteps];  // blocks of the running kernel that have ended each of its steps
  ClaimCounter claimed[kClaimGroups];  // of the running kernel: see Claims
  int32_t num_rows[kMaxRanks];         // of the messages being packed or unpacked, in order
  unsigned long long bad_entry;        // of the running route: see there
  int32_t routed_rows[kMaxRanks];      // rows that the last route found for each message, in order
  int32_t rail_rows[kMaxRanks];        // of the messages that a forward sums, by other node
  int32_t first_part[kMaxRanks];       // rows of the first part of the messages, in order
  int32_t first_row[kMaxRanks + 1];
  int32_t all_here;  // all messages of the dispatch being received have come
  Counters counters;
};
enum SlotPhase : int32_t { kFree, kSent, kForwarded, kReceiving };
// What a rank's first fault leaves of it; rising.
enum Faulted : int32_t {
  kSound,
  kPoisoned,  // what it sends is poisoned: nobody knows what it rests on
  kTimedOut,  // and it waits no more: each call of the program would wait for the same dead peer
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_DEVICE_STATE_H_
