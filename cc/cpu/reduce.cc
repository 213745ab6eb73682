#include "cc/cpu/reduce.h"

#include <algorithm>
#include <string>
#include <utility>

#include "cc/cpu/numeric.h"
#include "cc/cpu/pack.h"
#include "cc/fault_texts.h"
#include "cc/routing.h"

// A function with this attribute is compiled for several widths of vectors, and one version is
// chosen when the library is loaded. Code that runs under a sanitizer can not choose.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(SMF_SANITIZER)
#define SMF_VECTORIZED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SMF_VECTORIZED
#endif
#define SMF_INLINED __attribute__((always_inline))
#define SMF_INLINE inline SMF_INLINED

namespace jax_sm_free {
namespace {

constexpr int64_t kChunk = 512;  // columns summed at a time, in registers and the nearest cache
// Partial sums of a dot product; their order is the same on every machine.
constexpr int kLanes = 16;

// The rows of one sum, and their weights; null for a plain sum.
struct Terms {
  const std::byte* const* rows = nullptr;
  const float* weights = nullptr;
  int64_t size = 0;
};

template <typename T, bool kWeighted>
SMF_INLINE void SumChunk(const Terms& terms, int64_t begin, int64_t width,
                         typename T::Storage* sum) {
  float total[kChunk];
  const int64_t size = terms.size;
  for (int64_t i = 0; i < size; ++i) {
    const auto* row = reinterpret_cast<const typename T::Storage*>(terms.rows[i]) + begin;
    const float weight = kWeighted ? terms.weights[i] : 1.0F;
    if (i == 0) {  // sums start at +0, which turns -0 into +0
      for (int64_t c = 0; c < width; ++c) total[c] = 0.0F + weight * T::Load(row[c]);
    } else {
      for (int64_t c = 0; c < width; ++c) total[c] += weight * T::Load(row[c]);
    }
  }
  if (size == 0) std::fill_n(total, width, 0.0F);
  for (int64_t c = 0; c < width; ++c) sum[begin + c] = T::Store(total[c]);
}

template <typename T>
SMF_INLINE void SumBody(const Terms& terms, int64_t hidden, std::byte* out) {
  auto* sum = reinterpret_cast<typename T::Storage*>(out);
  for (int64_t begin = 0; begin < hidden; begin += kChunk) {
    const int64_t width = std::min(kChunk, hidden - begin);
    if (terms.weights == nullptr) {
      SumChunk<T, false>(terms, begin, width, sum);
    } else {
      SumChunk<T, true>(terms, begin, width, sum);
    }
  }
}

// out = weight * in; returns the dot product of `in` and `y`.
template <typename T>
SMF_INLINE float ScaleAndDotBody(const std::byte* in, const std::byte* y, float weight,
                                 int64_t hidden, std::byte* out) {
  using Storage = typename T::Storage;
  const auto* grad = reinterpret_cast<const Storage*>(in);
  const auto* value = reinterpret_cast<const Storage*>(y);
  auto* scaled = reinterpret_cast<Storage*>(out);
  float partial[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= hidden; c += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float g = T::Load(grad[c + lane]);
      partial[lane] += g * T::Load(value[c + lane]);
      scaled[c + lane] = T::Store(weight * g);
    }
  }
  for (int64_t lane = 0; c < hidden; ++c, ++lane) {
    const float g = T::Load(grad[c]);
    partial[lane] += g * T::Load(value[c]);
    scaled[c] = T::Store(weight * g);
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) partial[lane] += partial[lane + width];
  }
  return partial[0];
}

SMF_VECTORIZED void Sum(const Matrix& matrix, const Terms& terms, std::byte* out) {
  VisitDType(matrix.dtype,
             [&]<typename T>() SMF_INLINED { SumBody<T>(terms, matrix.hidden, out); });
}

SMF_VECTORIZED float ScaleAndDot(const Matrix& matrix, const std::byte* in, const std::byte* y,
                                 float weight, std::byte* out) {
  return VisitDType(matrix.dtype, [&]<typename T>() SMF_INLINED {
    return ScaleAndDotBody<T>(in, y, weight, matrix.hidden, out);
  });
}

}  // namespace

std::optional<Fault> Check(const Config& config, const LayoutIn& layout) {
  int64_t num_token_rows = 0;
  for (int32_t source = 0; source < config.ep_size; ++source) {
    const int32_t rows = layout.num_rows_from[source];
    if (rows < 0 || rows > config.max_tokens) {
      return LayoutCountDiffers(source, config.max_tokens, rows);
    }
    num_token_rows += rows;
  }
  for (int64_t i = 0; i < num_token_rows * layout.fanout; ++i) {
    if (layout.rows[i] >= -1 && layout.rows[i] < layout.num_rows) continue;
    return LayoutRowsDiffer(layout.num_rows, layout.rows[i]);
  }
  return std::nullopt;
}

std::vector<Message> PackSums(const Config& config, Kind kind, const Matrix& matrix,
                              const std::byte* y, const float* weights, const float* weight_grads,
                              const LayoutIn& layout, BlockPool& pool) {
  const IeeeScope ieee;
  std::vector<Message> messages;
  std::vector<const std::byte*> term_rows(layout.fanout);
  std::vector<float> term_weights(layout.fanout);
  const int32_t* rows = layout.rows;
  for (int32_t source = 0; source < config.ep_size; ++source) {
    const int32_t num_rows = layout.num_rows_from[source];
    Message message(pool.Take(), config,
                    {.kind = static_cast<int32_t>(kind),
                     .num_rows = num_rows,
                     .row_bytes = matrix.row_bytes()});
    for (int32_t i = 0; i < num_rows; ++i, rows += layout.fanout) {
      int64_t size = 0;
      for (int32_t k = 0; k < layout.fanout; ++k) {
        if (rows[k] < 0) continue;
        term_rows[size] = y + rows[k] * matrix.row_bytes();
        if (weights != nullptr) term_weights[size] = weights[rows[k]];
        ++size;
      }
      Sum(matrix, {term_rows.data(), weights == nullptr ? nullptr : term_weights.data(), size},
          message.row(i));
    }
    if (weight_grads != nullptr) {
      const int64_t num_entries = int64_t{num_rows} * config.top_k;
      std::copy_n(weight_grads, num_entries, message.weight());
      weight_grads += num_entries;
    }
    messages.push_back(std::move(message));
  }
  return messages;
}

std::optional<Fault> SumOverRanks(const Config& config, const Matrix& matrix, const TopK& topk,
                                  const std::vector<Message>& messages, const SumRows& out,
                                  float* weight_grads) {
  const Result<Route> made = Route::Make(config, topk);
  if (const Fault* fault = FaultOf(made)) return *fault;
  const auto& route = std::get<Route>(made);
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    const auto num_rows = static_cast<int64_t>(route.tokens(rank).size());
    if (auto fault = CheckMessage(messages[rank], rank, num_rows, matrix.row_bytes())) return fault;
  }
  const IeeeScope ieee;
  const int32_t num_local = config.num_local_experts();
  std::vector<int32_t> next(config.ep_size,
                            0);  // of each message: the first row that is not summed yet
  std::vector<const std::byte*> terms;
  for (int64_t t = 0; t < topk.num_tokens; ++t) {
    terms.clear();
    for (int32_t rank = 0; rank < config.ep_size; ++rank) {
      const std::vector<int32_t>& tokens = route.tokens(rank);
      if (next[rank] == static_cast<int32_t>(tokens.size()) || tokens[next[rank]] != t) continue;
      terms.push_back(messages[rank].row(next[rank]++));
    }
    Sum(matrix, {terms.data(), nullptr, static_cast<int64_t>(terms.size())},
        out.first + t * out.stride);
    if (weight_grads == nullptr) continue;
    for (int32_t k = 0; k < config.top_k; ++k) {
      const int64_t entry = t * config.top_k + k;
      const int32_t expert = topk.idx[entry];
      weight_grads[entry] = 0;
      if (expert < 0) continue;
      const int32_t rank = OwnerRank(expert, num_local);
      weight_grads[entry] = messages[rank].weight()[(next[rank] - 1) * int64_t{config.top_k} + k];
    }
  }
  return std::nullopt;
}

std::optional<Fault> SpreadGradients(const Config& config, const Matrix& matrix,
                                     const std::vector<Message>& messages, const LayoutIn& layout,
                                     const std::byte* y, const float* weights, std::byte* y_grad,
                                     float* weight_grads) {
  if (auto fault = Check(config, layout)) return fault;
  const IeeeScope ieee;
  const int64_t row_bytes = matrix.row_bytes();
  std::vector<bool> written(layout.num_rows);
  const int32_t* rows = layout.rows;
  for (int32_t source = 0; source < config.ep_size; ++source) {
    const int32_t num_rows = layout.num_rows_from[source];
    if (auto fault = CheckMessage(messages[source], source, num_rows, row_bytes)) return fault;
    for (int32_t i = 0; i < num_rows; ++i) {
      const std::byte* grad = messages[source].row(i);
      for (int32_t k = 0; k < layout.fanout; ++k, ++rows) {
        if (*rows < 0) continue;
        const int64_t offset = *rows * row_bytes;
        written[*rows] = true;
        if (weights == nullptr) {
          std::copy_n(grad, row_bytes, y_grad + offset);
        } else {
          weight_grads[*rows] =
              ScaleAndDot(matrix, grad, y + offset, weights[*rows], y_grad + offset);
        }
      }
    }
  }
  for (int64_t row = 0; row < layout.num_rows;
       ++row) {  // rows of padding, and rows behind the last group
    if (written[row]) continue;
    std::fill_n(y_grad + row * row_bytes, row_bytes, std::byte{0});
    if (weights != nullptr) weight_grads[row] = 0;
  }
  return std::nullopt;
}

}  // namespace jax_sm_free
