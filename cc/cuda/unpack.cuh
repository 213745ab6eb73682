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
  const int32_t* tokens;  // of the message's rows, where those are still in the array that was sent

  __device__ const std::byte* bytes() const {
    return message + layout.rows + row * layout.row_stride;
  }
};

// Row 0 of the message of `source`.
__device__ inline TokenRow FirstRow(const RankView& view, const ConstRows& own_rows,
                                    int32_t source) {
  const int32_t slot = view.state->current.slot;
  TokenRow first;
  first.source = source;
  first.row = 0;
  first.message = InMessage(view, slot, source);
  first.layout = LayoutOf(view.config, HeaderOf(first.message));
  const bool stayed = source == view.rank && own_rows.row_bytes() != 0;
  first.tokens = stayed ? view.own_token + int64_t{slot} * view.config.max_tokens : nullptr;
  return first;
}

// Where the two parts of a token row lie.
struct RowBytes {
  const std::byte* values;
  const std::byte* scales;
};
__device__ inline RowBytes BytesOf(const TokenRow& from, const ConstRows& own_rows,
                                   int64_t values_bytes) {
  if (from.tokens == nullptr) return {from.bytes(), from.bytes() + values_bytes};
  const int64_t token = from.tokens[from.row];
  return {own_rows.values + token * own_rows.values_bytes,
          own_rows.scales + token * own_rows.scales_bytes};
}

__device__ inline void SplitRow(const RowBytes& from, const MutableRows& out, int64_t row) {
  WarpCopy(out.values + row * out.values_bytes, from.values, out.values_bytes);
  WarpCopy(out.scales + row * out.scales_bytes, from.scales, out.scales_bytes);
}

__device__ inline void FillRow(const MutableRows& out, int64_t row, uint8_t value) {
  WarpFill(out.values + row * out.values_bytes, value, out.values_bytes);
  WarpFill(out.scales + row * out.scales_bytes, value, out.scales_bytes);
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_UNPACK_CUH_
