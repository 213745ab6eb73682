#include "cc/layout.h"

namespace jax_sm_free {

const char* KindName(Kind kind) {
  switch (kind) {
    case Kind::kDispatch:
      return "dispatch";
    case Kind::kCombine:
      return "combine";
    case Kind::kDispatchBackward:
      return "dispatch_backward";
    case Kind::kCombineBackward:
      return "combine_backward";
  }
  return "unknown";
}

}  // namespace jax_sm_free
