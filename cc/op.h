// The ops: their names, and the kind of exchange that each of them sends or receives.

#ifndef JAX_SM_FREE_CC_OP_H_
#define JAX_SM_FREE_CC_OP_H_

#include <cstdint>

#include "cc/layout.h"

namespace jax_sm_free {

enum class Op : int32_t {
  kDispatchSend,
  kDispatchRecv,
  kCombineSend,
  kCombineRecv,
  kCombineBackwardSend,
  kCombineBackwardRecv,
  kDispatchBackwardSend,
  kDispatchBackwardRecv,
  kDispatchForward,
  kCombineForward,
  kCombineBackwardForward,
  kDispatchBackwardForward,
};

// The name of an op in Python.
const char* OpName(Op op);

constexpr Kind KindOf(Op op) {
  switch (op) {
    case Op::kDispatchSend:
    case Op::kDispatchRecv:
    case Op::kDispatchForward:
      return Kind::kDispatch;
    case Op::kCombineSend:
    case Op::kCombineRecv:
    case Op::kCombineForward:
      return Kind::kCombine;
    case Op::kCombineBackwardSend:
    case Op::kCombineBackwardRecv:
    case Op::kCombineBackwardForward:
      return Kind::kCombineBackward;
    case Op::kDispatchBackwardSend:
    case Op::kDispatchBackwardRecv:
    case Op::kDispatchBackwardForward:
      break;
  }
  return Kind::kDispatchBackward;
}

// Whether the op passes an exchange on between nodes.
constexpr bool IsForward(Op op) {
  return op == Op::kDispatchForward || op == Op::kCombineForward ||
         op == Op::kCombineBackwardForward || op == Op::kDispatchBackwardForward;
}

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_OP_H_
