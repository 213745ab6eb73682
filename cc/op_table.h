// The operands and results of every op: their order, names, sizes and contents, in one table for
// all platforms, and the check of a call against it.
//
// Python checks at trace time what users pass. A program may also be made by hand, or changed
// since: whatever it passes, no handler may read or write past an array.

#ifndef JAX_SM_FREE_CC_OP_TABLE_H_
#define JAX_SM_FREE_CC_OP_TABLE_H_

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>

#include "cc/config.h"
#include "cc/op.h"
#include "cc/operands.h"

namespace jax_sm_free {

// What the size of a dimension is. Dimensions of one kind have one size in all arrays of a call.
enum class Dim : int8_t {
  // Sizes of the buffer.
  kTopK,
  kRanks,          // ep_size
  kLocalExperts,   // num_local_experts
  kRecvCapacity,   // recv_capacity
  kMaxRecvTokens,  // ep_size * max_tokens
  kTokenWords,     // kTokenSize
  // Sizes that a call chooses.
  kTokens,        // at most max_tokens
  kExpertRows,    // recv_capacity, or ep_size * max_tokens
  kWeighted,      // kExpertRows, or 0 where there are no weights
  kFanout,        // 1, or top_k
  kColumns,       // of rows that are summed
  kValueColumns,  // of rows that a dispatch moves
  kScaleColumns,  // of their scales; 0 for none
  kNumDims,
};

// What an array holds, where its type alone does not say so.
enum class Content : int8_t {
  kTyped,   // i32 or f32, as the handler's signature says
  kSummed,  // rows of float32, bfloat16 or float16, the same in all arrays of a call
  kValues,  // rows of a dispatch
  kScales,  // what is sent beside them
};

struct Operand {
  const char* name;  // in errors
  std::array<Dim, 2> dims;
  int32_t rank;
  Content content;

  constexpr Operand(const char* name, std::initializer_list<Dim> dims,
                    Content content = Content::kTyped)
      : name(name), dims{}, rank(static_cast<int32_t>(dims.size())), content(content) {
    int32_t i = 0;
    for (const Dim dim : dims) this->dims[i++] = dim;
  }
};

// Operands first, then results.
struct OpTable {
  Op op;
  std::span<const Operand> arrays;
};

extern const OpTable kDispatchSendTable;
extern const OpTable kDispatchRecvTable;
extern const OpTable kDispatchRecvTokensTable;
extern const OpTable kCombineSendTable;
extern const OpTable kCombineRecvTable;
extern const OpTable kCombineBackwardSendTable;
extern const OpTable kCombineBackwardRecvTable;
extern const OpTable kDispatchBackwardSendTable;
extern const OpTable kDispatchBackwardRecvTable;

// An array of a call, as far as it is checked.
struct Given {
  std::span<const int64_t> dims;
  std::optional<DType> dtype;  // nullopt where rows of this type can not be summed
  int64_t row_bytes = 0;       // of everything behind the first dimension
};

// What is wrong with the first array that is not as the table says: the text of an error. Nullopt
// where all are. `given` has the table's order.
std::optional<std::string> CheckOperands(const OpTable& table, const Config& config,
                                         std::span<const Given> given);

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_OP_TABLE_H_
