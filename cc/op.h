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
};

// The name of an op in Python.
const char* OpName(Op op);

constexpr Kind KindOf(Op op) {
  switch (op) {
    case Op::kDispatchSend:
    case Op::kDispatchRecv:
      return Kind::kDispatch;
    case Op::kCombineSend:
    case Op::kCombineRecv:
      return Kind::kCombine;
    case Op::kCombineBackwardSend:
    case Op::kCombineBackwardRecv:
      return Kind::kCombineBackward;
    case Op::kDispatchBackwardSend:
    case Op::kDispatchBackwardRecv:
      break;
  }
  return Kind::kDispatchBackward;
}

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_OP_H_
