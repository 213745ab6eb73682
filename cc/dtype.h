// Element types of rows that are summed.

#ifndef JAX_SM_FREE_CC_DTYPE_H_
#define JAX_SM_FREE_CC_DTYPE_H_

#include <cstdint>

namespace jax_sm_free {

// Python gives the number of a type (jax_sm_free/config.py). VisitDType (cc/cpu/numeric.h) turns a
// value into a type for code on the host, and VisitElement (cc/cuda/kernels/elements.cuh) into a
// type for kernels.
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
inline constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

constexpr int64_t ElementBytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_DTYPE_H_
