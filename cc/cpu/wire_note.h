// What precedes a payload between processes: the header of a message of a wire.

#ifndef JAX_SM_FREE_CC_CPU_WIRE_NOTE_H_
#define JAX_SM_FREE_CC_CPU_WIRE_NOTE_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <variant>
#include <vector>

#include "cc/cpu/call_site.h"
#include "cc/cpu/exchange.h"
#include "cc/fault.h"

namespace jax_sm_free {

// Precedes a message from member to member. The payload is the Message.
struct MessageNote {
  int32_t src = 0;  // the member that the message is numbered by: cc/cpu/hop.h
  int32_t dst = 0;
  ExchangeKey key;
  CallSite site;      // its number is also in the key
  int64_t start = 0;  // Statement describes it
};

// Says that `count` more ranks of a group have finished their sends in an exchange.
struct FinishedNote {
  int32_t group = 0;
  int32_t num_ranks = 0;
  ExchangeKey key;
};

struct WireNote {
  int64_t buffer = 0;
  std::variant<MessageNote, FinishedNote, Fault> body;  // a Fault ends the buffer on all ranks
};

// At most Wire::kMaxHeaderBytes long. Long texts of a fault are cut.
std::vector<std::byte> Encode(const WireNote& note);

// Null for bytes that Encode of this version has not made.
std::optional<WireNote> Decode(std::span<const std::byte> bytes);

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_WIRE_NOTE_H_
