#include "xla_ffi/operand_checks.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

#include "cc/token.h"

namespace jax_sm_free {
namespace {

constexpr int64_t kAny = -1;

// An array by its name, and the sizes that it has to have; kAny where another check has them.
class Expected {
 public:
  template <typename B>
  Expected(const char* name, const B& array, std::initializer_list<int64_t> sizes)
      : name_(name), seen_(array.dimensions()), rank_(sizes.size()) {
    std::ranges::copy(sizes, sizes_.begin());
  }
  template <typename B>
  Expected(const char* name, Out<B>& array, std::initializer_list<int64_t> sizes)
      : Expected(name, *array, sizes) {}

  const char* name() const { return name_; }
  ffi::Span<const int64_t> seen() const { return seen_; }
  std::span<const int64_t> sizes() const { return {sizes_.data(), rank_}; }
  bool IsMet() const {
    return std::ranges::equal(
        sizes(), seen_, [](int64_t size, int64_t dim) { return size == kAny || size == dim; });
  }

 private:
  const char* name_;
  ffi::Span<const int64_t> seen_;
  size_t rank_;
  std::array<int64_t, 2> sizes_{};
};

template <typename Range>
std::string ShapeOf(const Range& sizes) {
  std::string text;
  for (const int64_t size : sizes) {
    text += (text.empty() ? "" : ", ") + (size == kAny ? "any" : std::to_string(size));
  }
  return "[" + text + "]";
}

ffi::Error Refuse(Op op, const std::string& expected, const std::string& seen) {
  return ffi::Error::InvalidArgument(std::string("jax_sm_free: ") + OpName(op) + ": expected " +
                                     expected + ", seen " + seen);
}

ffi::Error CheckShapes(Op op, std::initializer_list<Expected> arrays) {
  for (const Expected& array : arrays) {
    if (array.IsMet()) continue;
    return Refuse(op, std::string(array.name()) + " of shape " + ShapeOf(array.sizes()),
                  ShapeOf(array.seen()));
  }
  return ffi::Error::Success();
}

// The first of two errors; both are found anyway, at a few comparisons each.
ffi::Error FirstOf(const ffi::Error& first, const ffi::Error& second) {
  return first.failure() ? first : second;
}

ffi::Error CheckTokens(Op op, const Config& config, int64_t num_tokens) {
  if (num_tokens <= config.max_tokens) return ffi::Error::Success();
  return Refuse(op, "at most " + std::to_string(config.max_tokens) + " tokens",
                std::to_string(num_tokens));
}

ffi::Error CheckRowBytes(Op op, const Config& config, int64_t row_bytes) {
  if (row_bytes <= config.row_bytes) return ffi::Error::Success();
  return Refuse(op, "rows of at most " + std::to_string(config.row_bytes) + " bytes",
                std::to_string(row_bytes));
}

// Rows that are summed, or that the wire quantises.
ffi::Error CheckElements(Op op, const char* name, const ffi::AnyBuffer& rows) {
  const ffi::DataType type = rows.element_type();
  if (type == ffi::F32 || type == ffi::BF16 || type == ffi::F16) return ffi::Error::Success();
  return Refuse(op, std::string(name) + " of float32, bfloat16 or float16",
                "elements of XLA's type " + std::to_string(static_cast<int>(type)));
}

ffi::Error CheckSummed(Op op, const Config& config, const char* name, const ffi::AnyBuffer& rows) {
  if (auto error = CheckElements(op, name, rows); error.failure()) return error;
  return CheckRowBytes(op, config, RowBytes(rows));
}

// Rows that a dispatch sends or has received.
ffi::Error CheckDispatched(Op op, const Config& config, const ffi::AnyBuffer& values,
                           const ffi::AnyBuffer& scales) {
  if (!config.float8_wire) {
    return CheckRowBytes(op, config, RowBytes(values) + RowBytes(scales));
  }
  if (auto error = CheckElements(op, "values", values); error.failure()) return error;
  if (RowBytes(scales) != 0) return Refuse(op, "no scales where the wire quantises", "some");
  return CheckRowBytes(op, config, QuantizedRowBytes(MatrixOf(values)));
}

// Rows of experts, and where the dispatch put them.
ffi::Error CheckExpertRows(Op op, const Config& config, const char* name, const ffi::AnyBuffer& y,
                           const S32& rows, const S32& num_rows_from) {
  if (auto error = CheckShapes(op, {{name, y, {kAny, kAny}},
                                    {"layout.rows", rows, {config.max_recv_tokens(), kAny}},
                                    {"layout.num_rows_from", num_rows_from, {config.ep_size}}});
      error.failure()) {
    return error;
  }
  const int64_t num_rows = y.dimensions()[0];
  if (num_rows != config.recv_capacity && num_rows != config.max_recv_tokens()) {
    return Refuse(op,
                  std::string(name) + " of " + std::to_string(config.recv_capacity) + " or " +
                      std::to_string(config.max_recv_tokens()) + " rows",
                  std::to_string(num_rows));
  }
  const int64_t fanout = rows.dimensions()[1];
  if (fanout != 1 && fanout != config.top_k) {
    return Refuse(op, "layout.rows of 1 or " + std::to_string(config.top_k) + " columns",
                  std::to_string(fanout));
  }
  return CheckSummed(op, config, name, y);
}

// One weight for each of `num_rows` rows, or none at all.
template <typename B>
ffi::Error CheckWeights(Op op, const char* name, B& weights, int64_t num_rows) {
  const Expected none(name, weights, {0});
  return none.IsMet() ? ffi::Error::Success() : CheckShapes(op, {{name, weights, {num_rows}}});
}

// Sums for the tokens of `topk_idx`.
ffi::Error CheckSums(Op op, const Config& config, const F32& token, const S32& topk_idx,
                     const char* name, Out<ffi::AnyBuffer>& sums) {
  if (auto error = CheckShapes(
          op, {{"token", token, {kTokenSize}}, {"topk_idx", topk_idx, {kAny, config.top_k}}});
      error.failure()) {
    return error;
  }
  const int64_t num_tokens = topk_idx.dimensions()[0];
  if (auto error = CheckShapes(op, {{name, sums, {num_tokens, kAny}}}); error.failure()) {
    return error;
  }
  return FirstOf(CheckTokens(op, config, num_tokens), CheckSummed(op, config, name, *sums));
}

}  // namespace

ffi::Error CheckDispatchSend(const Config& config, const ffi::AnyBuffer& values,
                             const ffi::AnyBuffer& scales, const S32& topk_idx,
                             const F32& topk_weights, const S32& position, Out<F32>& token) {
  constexpr Op kOp = Op::kDispatchSend;
  if (auto error = CheckShapes(kOp, {{"topk_idx", topk_idx, {kAny, config.top_k}}});
      error.failure()) {
    return error;
  }
  const int64_t num_tokens = topk_idx.dimensions()[0];
  if (auto error = CheckShapes(kOp, {{"topk_weights", topk_weights, {num_tokens, config.top_k}},
                                     {"values", values, {num_tokens, kAny}},
                                     {"scales", scales, {num_tokens, kAny}},
                                     {"position", position, {}},
                                     {"token", token, {kTokenSize}}});
      error.failure()) {
    return error;
  }
  return FirstOf(CheckTokens(kOp, config, num_tokens),
                 CheckDispatched(kOp, config, values, scales));
}

ffi::Error CheckReceivedRows(const Config& config, const F32& token,
                             const ffi::AnyBuffer& own_values, const ffi::AnyBuffer& own_scales,
                             Out<ffi::AnyBuffer>& values, Out<ffi::AnyBuffer>& scales,
                             int64_t num_rows) {
  constexpr Op kOp = Op::kDispatchRecv;
  if (auto error = CheckShapes(kOp, {{"token", token, {kTokenSize}},
                                     {"values", values, {num_rows, kAny}},
                                     {"scales", scales, {num_rows, kAny}},
                                     {"own values", own_values, {kAny, values->dimensions()[1]}},
                                     {"own scales", own_scales, {kAny, scales->dimensions()[1]}}});
      error.failure()) {
    return error;
  }
  const int64_t num_own = own_values.dimensions()[0];
  if (auto error = CheckShapes(kOp, {{"own scales", own_scales, {num_own, kAny}}});
      error.failure()) {
    return error;
  }
  if (num_own > 0 &&
      (RowBytes(own_values) != RowBytes(*values) || RowBytes(own_scales) != RowBytes(*scales))) {
    return Refuse(kOp, "own rows of the dtypes of the received ones", "others");
  }
  return FirstOf(CheckTokens(kOp, config, num_own), CheckDispatched(kOp, config, *values, *scales));
}

ffi::Error CheckReceivedExperts(const Config& config, Out<S32>& group_sizes, Out<S32>& counts,
                                Out<F32>& weights, Out<S32>& dropped, Out<S32>& rows,
                                Out<S32>& num_rows_from) {
  return CheckShapes(Op::kDispatchRecv,
                     {{"group_sizes", group_sizes, {config.num_local_experts()}},
                      {"counts", counts, {config.num_local_experts()}},
                      {"weights", weights, {config.recv_capacity}},
                      {"dropped", dropped, {}},
                      {"layout.rows", rows, {config.max_recv_tokens(), config.top_k}},
                      {"layout.num_rows_from", num_rows_from, {config.ep_size}}});
}

ffi::Error CheckReceivedTokens(const Config& config, Out<S32>& topk_idx, Out<F32>& topk_weights,
                               Out<S32>& counts, Out<S32>& num_tokens, Out<S32>& rows,
                               Out<S32>& num_rows_from) {
  const int64_t num_rows = config.max_recv_tokens();
  return CheckShapes(Op::kDispatchRecv,
                     {{"topk_idx", topk_idx, {num_rows, config.top_k}},
                      {"topk_weights", topk_weights, {num_rows, config.top_k}},
                      {"counts", counts, {config.num_local_experts()}},
                      {"num_tokens", num_tokens, {}},
                      {"layout.rows", rows, {num_rows, 1}},
                      {"layout.num_rows_from", num_rows_from, {config.ep_size}}});
}

ffi::Error CheckCombineSend(const Config& config, const ffi::AnyBuffer& y, const F32& weights,
                            const S32& rows, const S32& num_rows_from, Out<F32>& token) {
  constexpr Op kOp = Op::kCombineSend;
  if (auto error = CheckExpertRows(kOp, config, "y", y, rows, num_rows_from); error.failure()) {
    return error;
  }
  return FirstOf(CheckWeights(kOp, "weights", weights, y.dimensions()[0]),
                 CheckShapes(kOp, {{"token", token, {kTokenSize}}}));
}

ffi::Error CheckDispatchBackwardSend(const Config& config, const ffi::AnyBuffer& x_grad,
                                     const F32& weight_grads, const S32& rows,
                                     const S32& num_rows_from, Out<F32>& token) {
  constexpr Op kOp = Op::kDispatchBackwardSend;
  if (auto error = CheckExpertRows(kOp, config, "x_grad", x_grad, rows, num_rows_from);
      error.failure()) {
    return error;
  }
  return CheckShapes(kOp, {{"weight_grads", weight_grads, {config.max_recv_tokens(), config.top_k}},
                           {"token", token, {kTokenSize}}});
}

ffi::Error CheckCombineBackwardSend(const Config& config, const ffi::AnyBuffer& out_grad,
                                    const S32& topk_idx, Out<F32>& token) {
  constexpr Op kOp = Op::kCombineBackwardSend;
  if (auto error = CheckShapes(
          kOp, {{"topk_idx", topk_idx, {kAny, config.top_k}}, {"token", token, {kTokenSize}}});
      error.failure()) {
    return error;
  }
  const int64_t num_tokens = topk_idx.dimensions()[0];
  if (auto error = CheckShapes(kOp, {{"out_grad", out_grad, {num_tokens, kAny}}});
      error.failure()) {
    return error;
  }
  return FirstOf(CheckTokens(kOp, config, num_tokens),
                 CheckSummed(kOp, config, "out_grad", out_grad));
}

ffi::Error CheckCombineRecv(const Config& config, const F32& token, const S32& topk_idx,
                            const ffi::AnyBuffer& y, const F32& weights, const S32& rows,
                            const S32& num_rows_from, Out<ffi::AnyBuffer>& out) {
  constexpr Op kOp = Op::kCombineRecv;
  if (auto error = CheckSums(kOp, config, token, topk_idx, "the result", out); error.failure()) {
    return error;
  }
  if (auto error = CheckExpertRows(kOp, config, "y", y, rows, num_rows_from); error.failure()) {
    return error;
  }
  if (y.element_type() != out->element_type()) {
    return Refuse(kOp, "y of the result's dtype", "another");
  }
  return FirstOf(CheckWeights(kOp, "weights", weights, y.dimensions()[0]),
                 CheckShapes(kOp, {{"y", y, {kAny, out->dimensions()[1]}}}));
}

ffi::Error CheckDispatchBackwardRecv(const Config& config, const F32& token, const S32& topk_idx,
                                     Out<ffi::AnyBuffer>& x_grad, Out<F32>& weight_grads) {
  constexpr Op kOp = Op::kDispatchBackwardRecv;
  if (auto error = CheckSums(kOp, config, token, topk_idx, "x_grad", x_grad); error.failure()) {
    return error;
  }
  return CheckShapes(kOp,
                     {{"weight_grads", weight_grads, {topk_idx.dimensions()[0], config.top_k}}});
}

ffi::Error CheckCombineBackwardRecv(const Config& config, const F32& token, const ffi::AnyBuffer& y,
                                    const F32& weights, const S32& rows, const S32& num_rows_from,
                                    Out<ffi::AnyBuffer>& y_grad, Out<F32>& weight_grads) {
  constexpr Op kOp = Op::kCombineBackwardRecv;
  if (auto error = CheckShapes(kOp, {{"token", token, {kTokenSize}}}); error.failure()) {
    return error;
  }
  if (auto error = CheckExpertRows(kOp, config, "y_grad", *y_grad, rows, num_rows_from);
      error.failure()) {
    return error;
  }
  const int64_t num_weights = weights.element_count();
  const int64_t num_rows = num_weights == 0 ? 0 : y_grad->dimensions()[0];
  if (auto error = CheckShapes(kOp, {{"y", y, {num_rows, y_grad->dimensions()[1]}},
                                     {"weights", weights, {num_rows}},
                                     {"weight_grads", weight_grads, {num_rows}}});
      error.failure()) {
    return error;
  }
  if (y.element_type() != y_grad->element_type()) {
    return Refuse(kOp, "y of the dtype of its gradient", "another");
  }
  return ffi::Error::Success();
}

}  // namespace jax_sm_free
