// Token rows out of messages, by a warp each.

#ifndef JAX_SM_FREE_CC_CUDA_UNPACK_CUH_
#define JAX_SM_FREE_CC_CUDA_UNPACK_CUH_

#include <cstddef>
#include <cstdint>

#include "cc/cuda/device.cuh"
#include "cc/operands.h"

namespace jax_sm_free::cuda {

inline constexpr uint8_t kPoison = 0xFF;  // NaN in every float type, -1 in every integer type

// A received token row: which message it lies in, and where.
struct TokenRow {
  int32_t source;
  int32_t row;  // within the message
  std::byte* message;
  MessageLayout layout;

  __device__ const std::byte* bytes() const {
    return message + layout.rows + row * layout.row_stride;
  }
};

__device__ inline void SplitRow(const TokenRow& from, const MutableRows& out, int64_t row) {
  WarpCopy(out.values + row * out.values_bytes, from.bytes(), out.values_bytes);
  WarpCopy(out.scales + row * out.scales_bytes, from.bytes() + out.values_bytes, out.scales_bytes);
}

__device__ inline void FillRow(const MutableRows& out, int64_t row, uint8_t value) {
  WarpFill(out.values + row * out.values_bytes, value, out.values_bytes);
  WarpFill(out.scales + row * out.scales_bytes, value, out.scales_bytes);
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_UNPACK_CUH_
