#include "cc/cuda/status_fault.h"

#include <atomic>
#include <bit>
#include <string>
#include <vector>

#include "cc/fault_texts.h"
#include "cc/op.h"

namespace jax_sm_free::cuda {
namespace {

Fault Timeout(const Status& status, const Config& config) {
  std::vector<bool> arrived(config.ep_size);
  for (int32_t source = 0; source < config.ep_size; ++source) {
    arrived[source] = (status.detail >> source & 1) == 0;
  }
  Fault fault = MissingMessages(arrived, config.timeout_s, config.timeout_s);
  fault.seen += ", whose last in this slot was of exchange " + std::to_string(status.seen);
  return fault;
}

Fault AckTimeout(const Status& status, const Config& config) {
  const std::string peer = std::to_string(status.peer);
  return {.peer = status.peer,
          .expected = "rank " + peer + " to have read exchange " + std::to_string(status.expected) +
                      " within " + DescribeSeconds(config.timeout_s),
          .seen = "none read after exchange " + std::to_string(status.seen),
          .exchange = {}};
}

Fault Explain(const Status& status, const RankView& view) {
  const Config& config = view.config;
  const auto other = [&status](std::string expected, std::string seen) {
    return Fault{.peer = status.peer,
                 .expected = std::move(expected),
                 .seen = std::move(seen),
                 .exchange = {}};
  };
  switch (static_cast<FaultCode>(status.code)) {
    case FaultCode::kNone:
      break;
    case FaultCode::kTimeout:
      return Timeout(status, config);
    case FaultCode::kAckTimeout:
      return AckTimeout(status, config);
    case FaultCode::kSlots:
      return TooManySends(config.num_slots, "exchanges");
    case FaultCode::kToken:
      return NotOneToken(std::bit_cast<float>(static_cast<int32_t>(status.seen)));
    case FaultCode::kTokenUsed:
      return TokenUsedBefore(status.seen);
    case FaultCode::kTokenOrigin:
      return TokenOfAnother(view.buffer_id, view.rank, status.detail, status.seen);
    case FaultCode::kTokenKind:
      return TokenOfAnotherKind(static_cast<Kind>(status.expected), static_cast<Kind>(status.seen));
    case FaultCode::kIndex:
      return IndexOutOfRange(config.num_experts, status.seen, status.detail / config.top_k,
                             status.detail % config.top_k);
    case FaultCode::kPosition:
      return PositionDiffers(status.expected, status.seen);
    case FaultCode::kLayout:
      return LayoutRowsDiffer(status.expected, status.seen);
    case FaultCode::kLayoutCount:
      return LayoutCountDiffers(status.peer, config.max_tokens, status.seen);
    case FaultCode::kMessageKind:
      return other(std::string("a ") + KindName(static_cast<Kind>(status.expected)) + " message",
                   std::string("a ") + KindName(static_cast<Kind>(status.seen)) + " message");
    case FaultCode::kOutOfStep:
      return MessageDiffers(status.peer, status.detail >> 32, status.expected,
                            static_cast<int32_t>(status.detail), status.seen);
    case FaultCode::kPeer:
      return other("a message", "one poisoned by the peer's own fault");
    case FaultCode::kStopped:
      return other("a message", "the end of the wait: the buffer has failed or was closed");
  }
  return other("no fault", "fault code " + std::to_string(status.code));
}

}  // namespace

std::optional<Fault> FaultIn(Status& status, const RankView& view) {
  if (std::atomic_ref(status.code).load(std::memory_order_acquire) == 0) return std::nullopt;
  Fault fault = Explain(status, view);
  const Op op = static_cast<Op>(status.op);
  fault.op = OpName(op);
  fault.rank = view.rank;
  // Sequence numbers start at 1: a token that names no exchange leaves 0.
  if (status.sequence > 0) {
    fault.exchange = DescribeExchange(KindOf(op), status.sequence, status.slot);
  }
  return fault;
}

bool IsEcho(const Status& status) {
  const auto code = static_cast<FaultCode>(status.code);
  return code == FaultCode::kPeer || code == FaultCode::kStopped;
}

}  // namespace jax_sm_free::cuda
