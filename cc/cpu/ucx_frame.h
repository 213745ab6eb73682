// What precedes the header of each message on a UCX wire.

#ifndef JAX_SM_FREE_CC_CPU_UCX_FRAME_H_
#define JAX_SM_FREE_CC_CPU_UCX_FRAME_H_

#include <cstddef>
#include <cstdint>

#include "cc/cpu/wire.h"

namespace jax_sm_free {

enum class FrameKind : int32_t {
  kMessage,
  kGreeting,    // the first frame after its sender has connected
  kGoodbye,     // the last frame before its sender closes, except for acknowledgements
  kGoodbyeAck,  // all frames up to the goodbye have arrived
};

struct FramePrefix {
  FrameKind kind = FrameKind::kMessage;
  int32_t source = 0;     // the process that sent it
  uint64_t sequence = 0;  // counts the frames from that process to this one
};

inline constexpr size_t kMaxFrameHeaderBytes =
    sizeof(FramePrefix) + Wire::kMaxLabelBytes + Wire::kMaxHeaderBytes;

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_UCX_FRAME_H_
