#include "cc/op_table.h"

#include <algorithm>
#include <cstddef>
#include <utility>

#include "cc/token.h"

namespace jax_sm_free {
namespace {

using enum Dim;
using enum Content;

constexpr Operand kToken{"token", {kTokenWords}};
constexpr Operand kTopkIdx{"topk_idx", {kTokens, kTopK}};
constexpr Operand kLayoutRows{"layout.rows", {kMaxRecvTokens, kFanout}};
constexpr Operand kNumRowsFrom{"layout.num_rows_from", {kRanks}};
constexpr Operand kY{"y", {kExpertRows, kColumns}, kSummed};
constexpr Operand kWeights{"weights", {kWeighted}};
constexpr Operand kNodeTopk{"layout.node_topk", {kMaxRailTokens, kTopK}};

constexpr Operand kDispatchSend[] = {
    {"values", {kTokens, kValueColumns}, kValues},
    {"scales", {kTokens, kScaleColumns}, kScales},
    kTopkIdx,
    {"topk_weights", {kTokens, kTopK}},
    {"position", {}},
    kToken,
};
constexpr Operand kDispatchRecv[] = {
    kToken,
    {"own values", {kTokens, kValueColumns}, kValues},
    {"own scales", {kTokens, kScaleColumns}, kScales},
    {"values", {kRecvCapacity, kValueColumns}, kValues},
    {"scales", {kRecvCapacity, kScaleColumns}, kScales},
    {"group_sizes", {kLocalExperts}},
    {"counts", {kLocalExperts}},
    {"weights", {kRecvCapacity}},
    {"dropped", {}},
    {"layout.rows", {kMaxRecvTokens, kTopK}},
    kNumRowsFrom,
};
constexpr Operand kDispatchRecvTokens[] = {
    kToken,
    {"own values", {kTokens, kValueColumns}, kValues},
    {"own scales", {kTokens, kScaleColumns}, kScales},
    {"values", {kMaxRecvTokens, kValueColumns}, kValues},
    {"scales", {kMaxRecvTokens, kScaleColumns}, kScales},
    {"topk_idx", {kMaxRecvTokens, kTopK}},
    {"topk_weights", {kMaxRecvTokens, kTopK}},
    {"counts", {kLocalExperts}},
    {"num_tokens", {}},
    {"layout.rows", {kMaxRecvTokens, kOne}},
    kNumRowsFrom,
};
constexpr Operand kCombineSend[] = {kY, kWeights, kLayoutRows, kNumRowsFrom, kToken};
constexpr Operand kCombineRecv[] = {
    kToken,
    kTopkIdx,
    kY,
    kWeights,
    kLayoutRows,
    kNumRowsFrom,
    {"the result", {kTokens, kColumns}, kSummed},
};
constexpr Operand kCombineBackwardSend[] = {
    {"out_grad", {kTokens, kColumns}, kSummed},
    kTopkIdx,
    kToken,
};
constexpr Operand kCombineBackwardRecv[] = {
    kToken,
    {"y", {kWeighted, kColumns}, kSummed},
    kWeights,
    kLayoutRows,
    kNumRowsFrom,
    {"y_grad", {kExpertRows, kColumns}, kSummed},
    {"weight_grads", {kWeighted}},
};
constexpr Operand kDispatchBackwardSend[] = {
    {"x_grad", {kExpertRows, kColumns}, kSummed},
    {"weight_grads", {kMaxRecvTokens, kTopK}},
    kLayoutRows,
    kNumRowsFrom,
    kToken,
};
constexpr Operand kDispatchBackwardRecv[] = {
    kToken,
    kTopkIdx,
    {"x_grad", {kTokens, kColumns}, kSummed},
    {"weight_grads", {kTokens, kTopK}},
};
constexpr Operand kDispatchForward[] = {kToken, kToken, kNodeTopk};
constexpr Operand kForward[] = {kToken, kNodeTopk, kToken};

// The sizes of the dimensions of a call: those that the buffer fixes, and those of the arrays seen
// so far.
class Sizes {
 public:
  explicit Sizes(const Config& config) {
    sizes_.fill(kUnseen);
    at(kTopK) = config.top_k;
    at(kRanks) = config.ep_size;
    at(kLocalExperts) = config.num_local_experts();
    at(kRecvCapacity) = config.recv_capacity;
    at(kMaxRecvTokens) = config.max_recv_tokens();
    at(kMaxRailTokens) = int64_t{config.num_nodes} * config.max_tokens;
    at(kOne) = 1;
    at(kTokenWords) = kTokenSize;
  }

  int64_t& at(Dim dim) { return sizes_[static_cast<size_t>(dim)]; }

  // Whether the array has these sizes in common with the buffer and the arrays before it.
  bool Fits(const Operand& operand, std::span<const int64_t> dims) {
    if (dims.size() != static_cast<size_t>(operand.rank)) return false;
    for (size_t i = 0; i < dims.size(); ++i) {
      int64_t& size = at(operand.dims[i]);
      if (size == kUnseen) size = dims[i];
      if (size != dims[i]) return false;
    }
    return true;
  }

  std::string ShapeOf(const Operand& operand) {
    std::string text;
    for (int32_t i = 0; i < operand.rank; ++i) {
      const int64_t size = at(operand.dims[i]);
      text += (i == 0 ? "" : ", ") + (size == kUnseen ? "any" : std::to_string(size));
    }
    return "[" + text + "]";
  }

  static constexpr int64_t kUnseen = -1;

 private:
  std::array<int64_t, static_cast<size_t>(kNumDims)> sizes_{};
};

// The check of one call.
class Check {
 public:
  Check(const OpTable& table, const Config& config, std::span<const Given> given)
      : table_(table), config_(config), given_(given), sizes_(config) {}

  std::optional<std::string> Run() {
    if (CheckTiers() && CheckShapes() && CheckSizes() && CheckContents()) return std::nullopt;
    return std::string("jax_sm_free: ") + OpName(table_.op) + ": expected " + expected_ +
           ", seen " + seen_;
  }

 private:
  bool Refuse(std::string expected, std::string seen) {
    expected_ = std::move(expected);
    seen_ = std::move(seen);
    return false;
  }

  bool CheckTiers() {
    if (!IsForward(table_.op) || config_.has_two_tiers()) return true;
    return Refuse("a buffer of several nodes", "one of a single node");
  }

  bool CheckShapes() {
    for (size_t i = 0; i < given_.size(); ++i) {
      const Operand& operand = table_.arrays[i];
      if (sizes_.Fits(operand, given_[i].dims)) continue;
      std::string seen;
      for (const int64_t dim : given_[i].dims) {
        seen += (seen.empty() ? "" : ", ") + std::to_string(dim);
      }
      return Refuse(std::string(operand.name) + " of shape " + sizes_.ShapeOf(operand),
                    "[" + seen + "]");
    }
    return true;
  }

  // The name of the first array that has such a dimension, for errors.
  std::string NameOf(Dim dim) const {
    for (const Operand& operand : table_.arrays) {
      for (int32_t i = 0; i < operand.rank; ++i) {
        if (operand.dims[i] == dim) return operand.name;
      }
    }
    return "";
  }

  // Whether the size of `dim` is one of two, or no array of the call has this dimension.
  bool IsOneOf(Dim dim, int64_t first, int64_t second, const char* what) {
    const int64_t size = sizes_.at(dim);
    if (size == Sizes::kUnseen || size == first || size == second) return true;
    return Refuse(
        NameOf(dim) + " of " + std::to_string(first) + " or " + std::to_string(second) + " " + what,
        std::to_string(size));
  }

  bool CheckSizes() {
    const int64_t num_tokens = sizes_.at(kTokens);
    if (num_tokens > config_.max_tokens) {
      return Refuse("at most " + std::to_string(config_.max_tokens) + " tokens",
                    std::to_string(num_tokens));
    }
    return IsOneOf(kExpertRows, config_.recv_capacity, config_.max_recv_tokens(), "rows") &&
           IsOneOf(kWeighted, sizes_.at(kExpertRows), 0, "rows") &&
           IsOneOf(kFanout, 1, config_.top_k, "columns");
  }

  bool CheckContents() {
    for (size_t i = 0; i < given_.size(); ++i) {
      const bool fits = table_.arrays[i].content == kSummed ? CheckSummed(i) : CheckMoved(i);
      if (!fits) return false;
    }
    return true;
  }

  // The first array with the same content as array i.
  size_t FirstLike(size_t i) const {
    size_t first = 0;
    while (table_.arrays[first].content != table_.arrays[i].content) ++first;
    return first;
  }

  bool HasElements(size_t i) {
    if (given_[i].dtype) return true;
    return Refuse(std::string(table_.arrays[i].name) + " of float32, bfloat16 or float16",
                  "another dtype");
  }

  bool HasRowBytes(int64_t row_bytes) {
    if (row_bytes <= config_.row_bytes) return true;
    return Refuse("rows of at most " + std::to_string(config_.row_bytes) + " bytes",
                  std::to_string(row_bytes));
  }

  bool CheckSummed(size_t i) {
    if (!HasElements(i) || !HasRowBytes(given_[i].row_bytes)) return false;
    const size_t first = FirstLike(i);
    if (given_[i].dtype == given_[first].dtype) return true;
    return Refuse(
        std::string(table_.arrays[i].name) + " of the dtype of " + table_.arrays[first].name,
        "another");
  }

  // Rows of a dispatch. An array without rows may have any type.
  bool CheckMoved(size_t i) {
    const Content content = table_.arrays[i].content;
    if (content == kTyped || given_[i].dims[0] == 0) return true;
    const bool quantizes = config_.wire_format != WireFormat::kPlain;
    const size_t first = FirstLike(i);
    if (given_[first].dims[0] > 0 && given_[i].row_bytes != given_[first].row_bytes) {
      return Refuse(
          std::string(table_.arrays[i].name) + " of the dtype of " + table_.arrays[first].name,
          "another");
    }
    if (content == kScales) {
      if (quantizes && given_[i].row_bytes > 0) {
        return Refuse("no scales where the wire quantises", "some");
      }
      return quantizes || HasRowBytes(given_[i - 1].row_bytes + given_[i].row_bytes);
    }
    if (!quantizes) return true;
    if (!HasElements(i)) return false;
    const RowFormat format{config_.wire_format, {*given_[i].dtype, given_[i].dims[1]}};
    return HasRowBytes(format.WireBytes(given_[i].row_bytes));
  }

  const OpTable& table_;
  const Config& config_;
  const std::span<const Given> given_;
  Sizes sizes_;
  std::string expected_;
  std::string seen_;
};

}  // namespace

constexpr OpTable kDispatchSendTable{Op::kDispatchSend, kDispatchSend};
constexpr OpTable kDispatchRecvTable{Op::kDispatchRecv, kDispatchRecv};
constexpr OpTable kDispatchRecvTokensTable{Op::kDispatchRecv, kDispatchRecvTokens};
constexpr OpTable kCombineSendTable{Op::kCombineSend, kCombineSend};
constexpr OpTable kCombineRecvTable{Op::kCombineRecv, kCombineRecv};
constexpr OpTable kCombineBackwardSendTable{Op::kCombineBackwardSend, kCombineBackwardSend};
constexpr OpTable kCombineBackwardRecvTable{Op::kCombineBackwardRecv, kCombineBackwardRecv};
constexpr OpTable kDispatchBackwardSendTable{Op::kDispatchBackwardSend, kDispatchBackwardSend};
constexpr OpTable kDispatchBackwardRecvTable{Op::kDispatchBackwardRecv, kDispatchBackwardRecv};
constexpr OpTable kDispatchForwardTable{Op::kDispatchForward, kDispatchForward};
constexpr OpTable kCombineForwardTable{Op::kCombineForward, kForward};
constexpr OpTable kCombineBackwardForwardTable{Op::kCombineBackwardForward, kForward};
constexpr OpTable kDispatchBackwardForwardTable{Op::kDispatchBackwardForward, kForward};

std::optional<std::string> CheckOperands(const OpTable& table, const Config& config,
                                         std::span<const Given> given) {
  return Check(table, config, given).Run();
}

}  // namespace jax_sm_free
