#include "cc/op.h"

namespace jax_sm_free {

const char* OpName(Op op) {
  switch (op) {
    case Op::kDispatchSend:
      return "dispatch_send";
    case Op::kDispatchRecv:
      return "dispatch_recv";
    case Op::kCombineSend:
      return "combine_send";
    case Op::kCombineRecv:
      return "combine_recv";
    case Op::kCombineBackwardSend:
      return "combine_backward_send";
    case Op::kCombineBackwardRecv:
      return "combine_backward_recv";
    case Op::kDispatchBackwardSend:
      return "dispatch_backward_send";
    case Op::kDispatchBackwardRecv:
      return "dispatch_backward_recv";
    case Op::kDispatchForward:
      return "dispatch_forward";
    case Op::kCombineForward:
      return "combine_forward";
    case Op::kCombineBackwardForward:
      return "combine_backward_forward";
    case Op::kDispatchBackwardForward:
      return "dispatch_backward_forward";
  }
  return "unknown";
}

}  // namespace jax_sm_free
