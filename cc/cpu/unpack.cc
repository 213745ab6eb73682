#include "cc/cpu/unpack.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "cc/cpu/wire_rows.h"
#include "cc/routing.h"

namespace jax_sm_free {
namespace {

void ZeroRows(const MutableRows& out, int64_t begin, int64_t end) {
  if (begin >= end) return;
  if (out.values_bytes > 0) {
    std::memset(out.values + begin * out.values_bytes, 0, (end - begin) * out.values_bytes);
  }
  if (out.scales_bytes > 0) {
    std::memset(out.scales + begin * out.scales_bytes, 0, (end - begin) * out.scales_bytes);
  }
}

void ZeroExpertRows(const ExpertsOut& out, int64_t begin, int64_t end) {
  ZeroRows(out.rows, begin, end);
  std::fill(out.weights + begin, out.weights + std::max(begin, end), 0.0F);
}

template <typename Out>
std::optional<Fault> CheckRowBytes(const std::vector<Message>& messages, const Out& out) {
  const int64_t row_bytes = out.format.WireBytes(out.rows.row_bytes());
  for (size_t source = 0; source < messages.size(); ++source) {
    const Message& message = messages[source];
    if (auto fault = CheckMessage(message, static_cast<int32_t>(source), message.header().num_rows,
                                  row_bytes)) {
      return fault;
    }
  }
  return std::nullopt;
}

GroupPlan PlanOf(const Config& config, const std::vector<Message>& messages) {
  std::vector<const int32_t*> rows_per_expert;
  rows_per_expert.reserve(messages.size());
  for (const Message& message : messages) rows_per_expert.push_back(message.rows_per_expert());
  return {config, rows_per_expert};
}

}  // namespace

std::optional<Fault> UnpackExperts(const Config& config, const std::vector<Message>& messages,
                                   const ExpertsOut& out) {
  if (auto fault = CheckRowBytes(messages, out)) return fault;
  const GroupPlan plan = PlanOf(config, messages);
  int64_t end = 0;
  for (int32_t e = 0; e < config.num_local_experts(); ++e) {
    out.group_sizes[e] = static_cast<int32_t>(plan.group_size(e));
    out.counts[e] = static_cast<int32_t>(plan.count(e));
    end = plan.start(e) + plan.group_size(e);
    ZeroExpertRows(out, plan.start(e) + plan.kept(e), end);
  }
  ZeroExpertRows(out, end, config.recv_capacity);
  *out.dropped = static_cast<int32_t>(plan.dropped());

  int32_t* rows = out.layout.rows;
  for (size_t source = 0; source < messages.size(); ++source) {
    const Message& message = messages[source];
    const int32_t num_rows = message.header().num_rows;
    out.layout.num_rows_from[source] = num_rows;
    int64_t entry = 0;
    for (int32_t i = 0; i < num_rows; ++i) {
      for (int32_t k = 0; k < config.top_k; ++k, ++entry) {
        const int32_t expert = message.local_expert()[entry];
        const int64_t row =
            expert < 0 ? -1
                       : plan.Row(static_cast<int32_t>(source), expert, message.position()[entry]);
        *rows++ = static_cast<int32_t>(row);
        if (row < 0) continue;
        PutRow(out.format, message.row(i), out.rows, row);
        out.weights[row] = message.weight()[entry];
      }
    }
  }
  std::fill(rows, out.layout.rows + config.max_recv_tokens() * config.top_k, -1);
  return std::nullopt;
}

std::optional<Fault> UnpackTokens(const Config& config, const std::vector<Message>& messages,
                                  const TokensOut& out) {
  if (auto fault = CheckRowBytes(messages, out)) return fault;
  std::fill_n(out.counts, config.num_local_experts(), 0);
  int64_t next = 0;
  for (size_t source = 0; source < messages.size(); ++source) {
    const Message& message = messages[source];
    const int32_t num_rows = message.header().num_rows;
    out.layout.num_rows_from[source] = num_rows;
    for (int32_t e = 0; e < config.num_local_experts(); ++e) {
      out.counts[e] += message.rows_per_expert()[e];
    }
    const int64_t num_entries = int64_t{num_rows} * config.top_k;
    std::copy_n(message.local_expert(), num_entries, out.topk_idx + next * config.top_k);
    std::copy_n(message.weight(), num_entries, out.topk_weights + next * config.top_k);
    for (int32_t i = 0; i < num_rows; ++i, ++next) {
      PutRow(out.format, message.row(i), out.rows, next);
      out.layout.rows[next] = static_cast<int32_t>(next);
    }
  }
  *out.num_tokens = static_cast<int32_t>(next);
  const int64_t capacity = config.max_recv_tokens();
  ZeroRows(out.rows, next, capacity);
  std::fill(out.topk_idx + next * config.top_k, out.topk_idx + capacity * config.top_k, -1);
  std::fill(out.topk_weights + next * config.top_k, out.topk_weights + capacity * config.top_k,
            0.0F);
  std::fill(out.layout.rows + next, out.layout.rows + capacity, -1);
  return std::nullopt;
}

}  // namespace jax_sm_free
