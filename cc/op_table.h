// One table for all platforms of the operands and results of every op: their order, names, sizes
// and contents. CheckOperands checks a call against the table.
//
// Python checks at trace time what users pass. But a program may also be made by hand, or changed
// later. No handler may read or write past an array, whatever the program passes.

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

// The size of a dimension. All dimensions of one kind have the same size in a call.
enum class Dim : int8_t {
  // Sizes that the buffer fixes.
  kTopK,
  kRanks,          // ep_size
  kLocalExperts,   // num_local_experts
  kRecvCapacity,   // recv_capacity
  kMaxRecvTokens,  // ep_size * max_tokens
  kMaxRailTokens,  // num_nodes * max_tokens
  kOne,            // 1
  kTokenWords,     // kTokenSize
  // Sizes that each call chooses.
  kTokens,        // at most max_tokens
  kExpertRows,    // recv_capacity, or ep_size * max_tokens
  kWeighted,      // kExpertRows, or 0 where there are no weights
  kFanout,        // 1, or top_k
  kColumns,       // columns of rows that are summed
  kValueColumns,  // columns of rows that a dispatch sends
  kScaleColumns,  // columns of their scales; 0 for rows without scales
  kNumDims,
};

// What an array holds.
enum class Content : int8_t {
  kTyped,   // i32 or f32: the signature of the handler fixes the type
  kSummed,  // rows of float32, bfloat16 or float16; the same dtype in all arrays of a call
  kValues,  // rows of a dispatch
  kScales,  // scales of these rows
};

struct Operand {
  const char* name;  // for errors
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

// The operands come first, then the results.
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
extern const OpTable kDispatchForwardTable;
extern const OpTable kCombineForwardTable;
extern const OpTable kCombineBackwardForwardTable;
extern const OpTable kDispatchBackwardForwardTable;

// What is checked of an array of a call.
struct Given {
  std::span<const int64_t> dims;
  std::optional<DType> dtype;  // nullopt for a type that can not be summed
  int64_t row_bytes = 0;       // bytes of all elements with the same first index
};

// Returns an error that describes the first array that differs from the table, or nullopt if none
// does. `given` is in the order of the table.
std::optional<std::string> CheckOperands(const OpTable& table, const Config& config,
                                         std::span<const Given> given);

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_OP_TABLE_H_
