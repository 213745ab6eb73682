#include "cc/cpu/unpack_testing.h"

#include <utility>

#include "cc/cpu/block_pool.h"
#include "gtest/gtest.h"

namespace jax_sm_free::testing {

Config SmallConfig() {
  return {.ep_size = 3,
          .num_experts = 6,
          .top_k = 3,
          .max_tokens = 20,
          .recv_capacity = 180,
          .row_bytes = 32};
}

std::vector<Source> SameExperts(const Config& config, int64_t num_tokens,
                                const std::vector<int32_t>& idx) {
  Random random(7);
  std::vector<Source> sources;
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    Source source = RandomSource(config, num_tokens, 16, 0, random);
    for (size_t i = 0; i < source.idx.size(); ++i) source.idx[i] = idx[i % idx.size()];
    sources.push_back(std::move(source));
  }
  return sources;
}

void Append(const std::vector<std::byte>& part, int64_t row, int64_t row_bytes,
            std::vector<std::byte>& out) {
  if (row < 0) {
    out.resize(out.size() + row_bytes);
  } else {
    out.insert(out.end(), part.begin() + row * row_bytes, part.begin() + (row + 1) * row_bytes);
  }
}

ExpertsOut OutOf(const Source& like, Experts& experts) {
  return {
      .rows = {experts.values.data(), like.values_bytes, experts.scales.data(), like.scales_bytes},
      .group_sizes = experts.group_sizes.data(),
      .counts = experts.counts.data(),
      .weights = experts.weights.data(),
      .dropped = experts.dropped.data(),
      .layout = {experts.rows.data(), experts.num_rows_from.data()}};
}

Experts PoisonedExperts(const Config& config, const Source& like, int poison) {
  const int64_t capacity = config.recv_capacity;
  return {.values = Poisoned<std::byte>(capacity * like.values_bytes, poison),
          .scales = Poisoned<std::byte>(capacity * like.scales_bytes, poison),
          .group_sizes = Poisoned<int32_t>(config.num_local_experts(), poison),
          .counts = Poisoned<int32_t>(config.num_local_experts(), poison),
          .weights = Poisoned<float>(capacity, poison),
          .dropped = Poisoned<int32_t>(1, poison),
          .rows = Poisoned<int32_t>(config.max_recv_tokens() * config.top_k, poison),
          .num_rows_from = Poisoned<int32_t>(config.ep_size, poison)};
}

Experts UnpackedExperts(const Config& config, const std::vector<Source>& sources, int32_t rank,
                        int poison) {
  BlockPool pool = PoisonedPool(config, config.ep_size, poison);
  Experts experts = PoisonedExperts(config, sources[0], poison);
  const auto messages = DispatchMessages(config, sources, rank, pool);
  EXPECT_FALSE(UnpackExperts(config, messages, OutOf(sources[0], experts)).has_value());
  return experts;
}

TokensOut OutOf(const Source& like, Tokens& tokens) {
  return {
      .rows = {tokens.values.data(), like.values_bytes, tokens.scales.data(), like.scales_bytes},
      .topk_idx = tokens.topk_idx.data(),
      .topk_weights = tokens.topk_weights.data(),
      .counts = tokens.counts.data(),
      .num_tokens = tokens.num_tokens.data(),
      .layout = {tokens.rows.data(), tokens.num_rows_from.data()}};
}

Tokens PoisonedTokens(const Config& config, const Source& like, int poison) {
  const int64_t capacity = config.max_recv_tokens();
  return {.values = Poisoned<std::byte>(capacity * like.values_bytes, poison),
          .scales = Poisoned<std::byte>(capacity * like.scales_bytes, poison),
          .topk_idx = Poisoned<int32_t>(capacity * config.top_k, poison),
          .topk_weights = Poisoned<float>(capacity * config.top_k, poison),
          .counts = Poisoned<int32_t>(config.num_local_experts(), poison),
          .num_tokens = Poisoned<int32_t>(1, poison),
          .rows = Poisoned<int32_t>(capacity, poison),
          .num_rows_from = Poisoned<int32_t>(config.ep_size, poison)};
}

Tokens ExpectedTokens(const Config& config, const std::vector<Source>& sources, int32_t rank) {
  const int32_t num_local = config.num_local_experts();
  const int64_t capacity = config.max_recv_tokens();
  Tokens tokens{.counts = std::vector<int32_t>(num_local, 0),
                .num_tokens = {0},
                .num_rows_from = std::vector<int32_t>(config.ep_size, 0)};
  for (int32_t s = 0; s < config.ep_size; ++s) {
    const Source& source = sources[s];
    for (int64_t t = 0; t < source.num_tokens; ++t) {
      if (!Visits(config, source, t, rank)) continue;
      ++tokens.num_rows_from[s];
      tokens.rows.push_back(tokens.num_tokens[0]++);
      Append(source.values, t, source.values_bytes, tokens.values);
      Append(source.scales, t, source.scales_bytes, tokens.scales);
      for (int64_t i = t * config.top_k; i < (t + 1) * config.top_k; ++i) {
        const int32_t local = source.idx[i] - rank * num_local;
        const bool here = local >= 0 && local < num_local;
        tokens.topk_idx.push_back(here ? local : -1);
        tokens.topk_weights.push_back(here ? source.weights[i] : 0.0F);
        if (here) ++tokens.counts[local];
      }
    }
  }
  tokens.values.resize(capacity * sources[0].values_bytes);
  tokens.scales.resize(capacity * sources[0].scales_bytes);
  tokens.topk_idx.resize(capacity * config.top_k, -1);
  tokens.topk_weights.resize(capacity * config.top_k);
  tokens.rows.resize(capacity, -1);
  return tokens;
}

}  // namespace jax_sm_free::testing
