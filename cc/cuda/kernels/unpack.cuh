// Token rows from messages. A warp handles each row.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_UNPACK_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_UNPACK_CUH_

#include <cstddef>
#include <cstdint>

#include "cc/cuda/kernels/device.cuh"
#include "cc/operands.h"

namespace jax_sm_free::cuda {

inline constexpr uint8_t kPoison = 0xFF;  // NaN in every float type, -1 in every integer type

// Where the two parts of a token row lie.
struct RowBytes {
  const std::byte* values;
  const std::byte* scales;
};

// Where rows of one width lie, one after the other.
struct RowsAt {
  RowBytes first;
  int64_t values_stride;  // bytes from one row to the next
  int64_t scales_stride;

  __device__ RowBytes at(int64_t i) const {
    return {first.values + i * values_stride, first.scales + i * scales_stride};
  }
};

// Where the parts of the message of one source lie.
struct Source {
  int32_t rank;
  const int32_t* local_expert;  // [num_rows, top_k]
  const int32_t* position;      // [num_rows, top_k]
  const float* weight;          // [num_rows, top_k]
  const int32_t*
      number;  // of each row: its number in the order of tokens; null if rows are in this order
  RowsAt rows;
  const int32_t* token;  // of each row: its token, if `rows` are those of all tokens; else null
  // Where the common rows lie in another message. Null if this message has them.
  const std::byte* common;
  Placing placing;
  Placing other;  // of that message
};

// `values_bytes` are the bytes of the values of a row.
__device__ inline Source SourceOf(const RankView& view, const ConstRows& own_rows,
                                  int64_t values_bytes, int32_t rank) {
  const Current& current = view.state->current;
  std::byte* message = InMessage(view, current.slot, rank);
  const MessageHeader& header = HeaderOf(message);
  const MessageLayout layout = LayoutOf(view.config, header);
  Source source;
  source.rank = rank;
  source.local_expert = PartOf<int32_t>(message, layout.local_expert);
  source.position = PartOf<int32_t>(message, layout.position);
  source.weight = PartOf<float>(message, layout.weight);
  const bool has_common = header.num_common > 0;
  source.number = has_common ? PartOf<int32_t>(message, layout.number) : nullptr;
  const std::byte* rows = message + layout.rows;
  source.rows = {{rows, rows + values_bytes}, layout.row_stride, layout.row_stride};
  source.token = nullptr;
  source.common = nullptr;
  if (rank == view.rank && own_rows.row_bytes() != 0) {
    source.token = view.own_token + int64_t{current.slot} * view.config.max_tokens;
    source.rows = {
        {own_rows.values, own_rows.scales}, own_rows.values_bytes, own_rows.scales_bytes};
  } else if (has_common && (current.in_place >> rank & 1U) != 0) {
    const std::byte* other = CommonMessage(view, current.slot, rank);
    source.common = other + LayoutOf(view.config, HeaderOf(other)).rows;
    source.placing = PlacingOf(header);
    source.other = PlacingOf(HeaderOf(other));
  }
  return source;
}

// A received token row, named by its place in the message of its source.
struct TokenRow {
  const Source& source;
  int32_t place;

  // Its number in the order of tokens.
  __device__ int32_t number() const {
    return source.number == nullptr ? place : source.number[place];
  }
  __device__ RowBytes bytes() const {
    const RowsAt& rows = source.rows;
    if (source.common != nullptr) {
      const int32_t there = PlaceInOther(source.placing, place, source.other);
      const int64_t to_scales = rows.first.scales - rows.first.values;
      const std::byte* values = source.common + there * rows.values_stride;
      if (there >= 0) return {values, values + to_scales};
    }
    return rows.at(source.token == nullptr ? place : source.token[place]);
  }
};

__device__ inline void SplitRow(const RowBytes& from, const MutableRows& out, int64_t row) {
  WarpCopy(out.values + row * out.values_bytes, from.values, out.values_bytes);
  WarpCopy(out.scales + row * out.scales_bytes, from.scales, out.scales_bytes);
}

__device__ inline void FillRow(const MutableRows& out, int64_t row, uint8_t value) {
  WarpFill(out.values + row * out.values_bytes, value, out.values_bytes);
  WarpFill(out.scales + row * out.scales_bytes, value, out.scales_bytes);
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_UNPACK_CUH_
