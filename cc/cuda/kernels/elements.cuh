// Vectors of row elements for 16-byte loads and stores, and the arithmetic that the contract
// requires: in float32, first a product, then a sum. It never uses fused multiply-add, so that the
// host computes the same bits.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_ELEMENTS_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_ELEMENTS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cc/operands.h"

namespace jax_sm_free::cuda {

template <typename T>
__device__ inline float ToFloat(T value) {
  return static_cast<float>(value);
}
template <typename T>
__device__ inline T FromFloat(float value);
template <>
__device__ inline float FromFloat<float>(float value) {
  return value;
}
template <>
__device__ inline __half FromFloat<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 FromFloat<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// kWidth elements of type T. One load or store moves them.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T elements[kWidth];
};

// The bits of a vector. An array of bits stays in registers. An array of vectors does not always:
// the compiler splits it into elements where some vectors are only sometimes loaded.
template <typename V>
using BitsOf = std::conditional_t<sizeof(V) == sizeof(uint4), uint4,
                                  std::conditional_t<sizeof(V) == 4, uint32_t, uint16_t>>;

// Calls fn<T, kWidth>() with the element type of `matrix`, and the number of elements that one load
// moves: 16 bytes of them where rows are whole multiples of 16 bytes, else one.
template <typename Fn>
void VisitElement(const Matrix& matrix, Fn fn) {
  const bool wide = matrix.row_bytes() % 16 == 0;
  switch (matrix.dtype) {
    case DType::kFloat32:
      return wide ? fn.template operator()<float, 4>() : fn.template operator()<float, 1>();
    case DType::kBFloat16:
      return wide ? fn.template operator()<__nv_bfloat16, 8>()
                  : fn.template operator()<__nv_bfloat16, 1>();
    case DType::kFloat16:
      return wide ? fn.template operator()<__half, 8>() : fn.template operator()<__half, 1>();
  }
}

// Calls fn<T, kWidth>() for everything that VisitElement chooses from.
template <typename Fn>
void ForEachElement(Fn fn) {
  for (const DType dtype : kDTypes) {
    VisitElement(Matrix{dtype, 8}, fn);
    VisitElement(Matrix{dtype, 1}, fn);
  }
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_ELEMENTS_CUH_
