// Views of the arrays that ops read and write: pointers into the memory of the caller, and shapes.
// The ops of all platforms take the same views.

#ifndef JAX_SM_FREE_CC_OPERANDS_H_
#define JAX_SM_FREE_CC_OPERANDS_H_

#include <cstddef>
#include <cstdint>

#include "cc/dtype.h"
#include "cc/wire_format.h"

namespace jax_sm_free {

// The two parts of rows: values, and their scales if they have any. On the wire, the scales of a
// row lie behind its values. scales_bytes is 0 for rows without scales.
template <typename Byte>
struct RowParts {
  Byte* values = nullptr;
  int64_t values_bytes = 0;
  Byte* scales = nullptr;
  int64_t scales_bytes = 0;

  constexpr int64_t row_bytes() const { return values_bytes + scales_bytes; }
};
using ConstRows = RowParts<const std::byte>;
using MutableRows = RowParts<std::byte>;

// idx is i32 [num_tokens, top_k], row-major; weights is f32 of the same shape.
struct TopK {
  const int32_t* idx = nullptr;
  const float* weights = nullptr;  // null where the exchange carries no weights
  int64_t num_tokens = 0;
};

// Rows of `hidden` elements.
struct Matrix {
  DType dtype = DType::kFloat32;
  int64_t hidden = 0;

  constexpr int64_t row_bytes() const { return hidden * ElementBytes(dtype); }
};

// How the rows of a dispatch travel.
struct RowFormat {
  WireFormat wire = WireFormat::kPlain;
  // The element type and the columns of the rows. Plain rows do not use it.
  Matrix matrix = {};

  constexpr bool is_plain() const { return wire == WireFormat::kPlain; }

  // Bytes on the wire of a row that has `row_bytes` bytes in the arrays of the program.
  constexpr int64_t WireBytes(int64_t row_bytes) const {
    return VisitWireFormat(wire, [&]<typename Format>() {
      if constexpr (Format::kQuantizes) {
        return matrix.hidden + ScalesBytes<Format>(matrix.hidden);
      } else {
        return row_bytes;
      }
    });
  }
};

// Where the rows of a dispatch went, as an operand. jax_sm_free.results.Layout has the contract.
struct LayoutIn {
  const int32_t* rows = nullptr;           // [ep_size * max_tokens, fanout]
  const int32_t* num_rows_from = nullptr;  // [ep_size]
  int32_t fanout = 1;
  int64_t num_rows = 0;  // the first dimension of y: `rows` names rows below this number
};

// Where the rows of a dispatch went, as a result.
struct LayoutOut {
  int32_t* rows = nullptr;           // [ep_size * max_tokens, fanout]; -1 for none
  int32_t* num_rows_from = nullptr;  // [ep_size]
};

// Rows of experts, and where the dispatch put them.
struct ExpertRows {
  const std::byte* y = nullptr;
  const float* weights = nullptr;  // [num_rows]; null for a plain sum
  LayoutIn layout;
};

// The operands and results of each op, except tokens.

// dispatch_send.
struct DispatchSendIn {
  // i32 []: the position in the mesh that the program expects of this rank.
  const int32_t* position = nullptr;
  TopK topk;
  ConstRows rows;  // [num_tokens]
  RowFormat format = {};
};

// combine_backward_send.
struct RowsIn {
  TopK topk;
  ConstRows rows;  // [num_tokens]
};

// combine_send, dispatch_backward_send.
struct SumsIn {
  Matrix matrix;
  ExpertRows rows;
  const float* weight_grads = nullptr;  // [ep_size * max_tokens, top_k]; null for combine_send
};

// dispatch_forward.
struct ForwardOut {
  float* token = nullptr;
  // i32 [num_nodes * max_tokens, top_k]: the routing of the rail messages that this rank has
  // received. Row m * max_tokens + i belongs to row i of the message from node m: node experts
  // (cc/tiers.h), and -1 for none. Rows that no message has are -1.
  int32_t* node_topk = nullptr;
};

// The forward of an exchange that follows a dispatch.
struct ForwardIn {
  const int32_t* node_topk = nullptr;  // of the dispatch
};

// The rows that this rank gave to the send of a dispatch.
struct OwnRows {
  ConstRows rows;
  int64_t num_tokens = 0;
};

// dispatch_recv of output "experts".
struct ExpertsOut {
  MutableRows rows;  // [recv_capacity]
  RowFormat format = {};
  int32_t* group_sizes = nullptr;  // [num_local_experts]
  int32_t* counts = nullptr;       // [num_local_experts]
  float* weights = nullptr;        // [recv_capacity]
  int32_t* dropped = nullptr;      // []
  LayoutOut layout;                // fanout is top_k
};

// dispatch_recv of output "tokens", with R = ep_size * max_tokens.
struct TokensOut {
  MutableRows rows;  // [R]
  RowFormat format = {};
  int32_t* topk_idx = nullptr;    // [R, top_k]
  float* topk_weights = nullptr;  // [R, top_k]
  int32_t* counts = nullptr;      // [num_local_experts]
  int32_t* num_tokens = nullptr;  // []
  LayoutOut layout;               // fanout is 1
};

// combine_recv, dispatch_backward_recv.
struct SumsOut {
  Matrix matrix;
  TopK topk;                      // without weights
  std::byte* sums = nullptr;      // [num_tokens, hidden]
  float* weight_grads = nullptr;  // [num_tokens, top_k]; null for combine_recv
};

// combine_backward_recv.
struct SpreadOut {
  Matrix matrix;
  ExpertRows rows;                // y is unused where there are no weights
  std::byte* y_grad = nullptr;    // [num_rows, hidden]
  float* weight_grads = nullptr;  // [num_rows]; unused where there are no weights
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_OPERANDS_H_
