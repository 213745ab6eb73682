// The fault that the opening of a buffer returns.

#ifndef JAX_SM_FREE_CC_CUDA_HOST_REFUSAL_H_
#define JAX_SM_FREE_CC_CUDA_HOST_REFUSAL_H_

#include <string>
#include <utility>

#include "cc/fault.h"

namespace jax_sm_free::cuda {

// A buffer cannot be opened, because `expected` does not hold.
inline Fault Refuse(std::string expected, std::string seen) {
  return {.op = "Buffer", .expected = std::move(expected), .seen = std::move(seen), .exchange = {}};
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_HOST_REFUSAL_H_
