#include "cc/cuda/host/status_fault.h"

#include <atomic>
#include <bit>
#include <string>
#include <vector>

#include "cc/fault_texts.h"
#include "cc/op.h"
#include "cc/tiers.h"

namespace jax_sm_free::cuda {
namespace {

// From how many ranks the messages come that an op waits for.
int32_t NumSources(const Config& config, Op op) {
  if (!config.has_two_tiers()) return config.ep_size;
  switch (op) {
    case Op::kDispatchForward:
    case Op::kCombineBackwardForward:
      return config.num_nodes - 1;
    case Op::kCombineForward:
    case Op::kDispatchBackwardForward:
      return config.node_size();
    case Op::kCombineRecv:
    case Op::kDispatchBackwardRecv:
      return NumLanes(config);
    default:
      return config.ep_size;
  }
}

Fault Timeout(const FaultRecord& record, const Config& config, double waited_s) {
  std::vector<int32_t> missing;
  for (int32_t source = 0; source < config.ep_size; ++source) {
    if ((record.detail >> source & 1) != 0) missing.push_back(source);
  }
  const auto op = static_cast<Op>(record.op);
  Fault fault = MissingMessages(missing, NumSources(config, op), config.timeout_s, waited_s);
  fault.seen += ", whose last in this slot was of exchange " + std::to_string(record.seen);
  return fault;
}

// A route has met an index of an expert that does not exist.
Fault BadIndex(const FaultRecord& record, const Config& config) {
  const int64_t row = record.detail / config.top_k;
  const int64_t k = record.detail % config.top_k;
  if (!IsForward(static_cast<Op>(record.op))) {
    return IndexOutOfRange(config.num_experts, record.seen, row, k);
  }
  return NodeTopKDiffers(NodeConfig(config).num_experts, record.seen, row, k);
}

Fault AckTimeout(const FaultRecord& record, const Config& config) {
  const std::string peer = std::to_string(record.peer);
  return {.peer = record.peer,
          .expected = "rank " + peer + " to have read exchange " + std::to_string(record.expected) +
                      " within " + DescribeSeconds(config.timeout_s),
          .seen = "none read after exchange " + std::to_string(record.seen),
          .exchange = {}};
}

Fault Explain(const FaultRecord& record, const RankView& view, double waited_s) {
  const Config& config = view.config;
  const auto other = [&record](std::string expected, std::string seen) {
    return Fault{.peer = record.peer,
                 .expected = std::move(expected),
                 .seen = std::move(seen),
                 .exchange = {}};
  };
  switch (static_cast<FaultCode>(record.code)) {
    case FaultCode::kNone:
      break;
    case FaultCode::kTimeout:
      return Timeout(record, config, waited_s);
    case FaultCode::kAckTimeout:
      return AckTimeout(record, config);
    case FaultCode::kSlots:
      return TooManySends(config.num_slots);
    case FaultCode::kToken:
      return NotOneToken(std::bit_cast<float>(static_cast<int32_t>(record.seen)));
    case FaultCode::kTokenUsed:
      return IsForward(static_cast<Op>(record.op)) ? ForwardedBefore(record.seen)
                                                   : TokenUsedBefore(record.seen);
    case FaultCode::kNotForwarded:
      return NotForwarded(record.seen);
    case FaultCode::kTokenOrigin:
      return TokenOfAnother(view.buffer_id, view.rank, record.detail, record.seen);
    case FaultCode::kTokenKind:
      return TokenOfAnotherKind(static_cast<Kind>(record.expected), static_cast<Kind>(record.seen));
    case FaultCode::kIndex:
      return BadIndex(record, config);
    case FaultCode::kPosition:
      return PositionDiffers(record.expected, record.seen);
    case FaultCode::kLayout:
      return LayoutRowsDiffer(record.expected, record.seen);
    case FaultCode::kLayoutCount:
      return LayoutCountDiffers(record.peer, config.max_tokens, record.seen);
    case FaultCode::kMessageKind:
      return other(std::string("a ") + KindName(static_cast<Kind>(record.expected)) + " message",
                   std::string("a ") + KindName(static_cast<Kind>(record.seen)) + " message");
    case FaultCode::kOutOfStep:
      return MessageDiffers(record.peer, record.detail >> 32, record.expected,
                            static_cast<int32_t>(record.detail), record.seen);
    case FaultCode::kPeer:
      return other("a message", "one poisoned by the peer's own fault");
    case FaultCode::kStopped:
      return other("a message", "the end of the wait: the buffer has failed or was closed");
  }
  return other("no fault", "fault code " + std::to_string(record.code));
}

}  // namespace

std::optional<Fault> FaultIn(FaultRecord& record, const RankView& view, double waited_s) {
  if (std::atomic_ref(record.code).load(std::memory_order_acquire) == 0) return std::nullopt;
  Fault fault = Explain(record, view, waited_s);
  const Op op = static_cast<Op>(record.op);
  fault.op = OpName(op);
  fault.rank = view.rank;
  NameNodes(view.config, fault);
  // Sequence numbers start at 1. The record has 0 if the token names no exchange.
  if (record.sequence > 0) {
    fault.exchange = DescribeExchange(KindOf(op), record.sequence, record.slot);
  }
  return fault;
}

bool IsEcho(const FaultRecord& record) {
  const auto code = static_cast<FaultCode>(record.code);
  return code == FaultCode::kPeer || code == FaultCode::kStopped;
}

}  // namespace jax_sm_free::cuda
