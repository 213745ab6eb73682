#include "cc/cpu/unpack.h"

#include <algorithm>
#include <cstddef>
#include <utility>

#include "cc/cpu/quantize.h"
#include "cc/cpu/testing.h"
#include "cc/quantized.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using testing::DispatchMessages;
using testing::ExpertRow;
using testing::kPoisons;
using testing::Placement;
using testing::PlacementOf;
using testing::Poisoned;
using testing::PoisonedPool;
using testing::Random;
using testing::RandomSource;
using testing::RandomSources;
using testing::Source;
using testing::Visits;

Config SmallConfig() {
  return {.ep_size = 3,
          .num_experts = 6,
          .top_k = 3,
          .max_tokens = 20,
          .recv_capacity = 180,
          .row_bytes = 32};
}

// Adds the rows of `part` from `row` on to `out`; zeros where row is -1.
void Append(const std::vector<std::byte>& part, int64_t row, int64_t row_bytes,
            std::vector<std::byte>& out) {
  if (row < 0) {
    out.resize(out.size() + row_bytes);
  } else {
    out.insert(out.end(), part.begin() + row * row_bytes, part.begin() + (row + 1) * row_bytes);
  }
}

// ------------------------------------------------------------------------------- expert groups

// All that UnpackExperts writes.
struct Experts {
  std::vector<std::byte> values = {}, scales = {};
  std::vector<int32_t> group_sizes = {}, counts = {};
  std::vector<float> weights = {};
  std::vector<int32_t> dropped = {};
  std::vector<int32_t> rows = {}, num_rows_from = {};
};

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

Experts ExpectedExperts(const Config& config, const std::vector<Source>& sources, int32_t rank) {
  const Placement placement = PlacementOf(config, sources, rank);
  Experts experts{.group_sizes = placement.group_sizes,
                  .counts = placement.counts,
                  .dropped = {placement.dropped},
                  .num_rows_from = std::vector<int32_t>(config.ep_size, 0)};
  for (const std::optional<ExpertRow>& row : placement.rows) {
    const Source& source = sources[row ? row->source : 0];
    Append(source.values, row ? row->token : -1, source.values_bytes, experts.values);
    Append(source.scales, row ? row->token : -1, source.scales_bytes, experts.scales);
    experts.weights.push_back(row ? source.weights[row->token * config.top_k + row->k] : 0.0F);
  }
  for (int32_t s = 0; s < config.ep_size; ++s) {
    for (int64_t t = 0; t < sources[s].num_tokens; ++t) {
      if (!Visits(config, sources[s], t, rank)) continue;
      ++experts.num_rows_from[s];
      for (int32_t k = 0; k < config.top_k; ++k) experts.rows.push_back(placement.Find(s, t, k));
    }
  }
  experts.rows.resize(config.max_recv_tokens() * config.top_k, -1);
  return experts;
}

// Every element is compared, on every rank, whatever it held before.
void ExpectExpertsAsTheContractSays(const Config& config, const std::vector<Source>& sources) {
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    const Experts expected = ExpectedExperts(config, sources, rank);
    for (const int poison : kPoisons) {
      const Experts seen = UnpackedExperts(config, sources, rank, poison);
      ASSERT_EQ(seen.group_sizes, expected.group_sizes);
      ASSERT_EQ(seen.counts, expected.counts);
      ASSERT_EQ(seen.dropped, expected.dropped);
      ASSERT_EQ(seen.rows, expected.rows);
      ASSERT_EQ(seen.num_rows_from, expected.num_rows_from);
      ASSERT_EQ(seen.weights, expected.weights);
      ASSERT_EQ(seen.values, expected.values);
      ASSERT_EQ(seen.scales, expected.scales);
    }
  }
}

TEST(UnpackExpertsTest, RandomRouting) {
  Random random;
  for (int i = 0; i < 40; ++i) {
    const Config config = SmallConfig();
    ASSERT_NO_FATAL_FAILURE(
        ExpectExpertsAsTheContractSays(config, RandomSources(config, 30, 0, random)));
  }
}

TEST(UnpackExpertsTest, RandomRoutingCapacityAndAlignment) {
  Random random(2);
  for (int i = 0; i < 60; ++i) {
    Config config = SmallConfig();
    config.recv_capacity = random.Below(100);
    config.expert_alignment = 1 + random.Below(16);
    ASSERT_NO_FATAL_FAILURE(
        ExpectExpertsAsTheContractSays(config, RandomSources(config, 5, 3, random)));
  }
}

TEST(UnpackExpertsTest, ScalesTravelBesideValues) {
  Random random(3);
  const Config config = SmallConfig();
  ExpectExpertsAsTheContractSays(config, RandomSources(config, 24, 8, random));
}

TEST(UnpackExpertsTest, ManyRanksOfOneExpert) {
  Random random(4);
  Config config = SmallConfig();
  config.ep_size = 8;
  config.num_experts = 8;
  config.recv_capacity = 300;
  ExpectExpertsAsTheContractSays(config, RandomSources(config, 7, 0, random));
}

TEST(UnpackExpertsTest, OneRankOfManyExperts) {
  Random random(5);
  Config config = SmallConfig();
  config.ep_size = 1;
  config.num_experts = 64;
  ExpectExpertsAsTheContractSays(config, RandomSources(config, 7, 0, random));
}

TEST(UnpackExpertsTest, TopK32AndTopK1) {
  Random random(6);
  Config config = SmallConfig();
  config.top_k = 32;
  config.recv_capacity = 600;
  ExpectExpertsAsTheContractSays(config, RandomSources(config, 7, 0, random));
  config.top_k = 1;
  ExpectExpertsAsTheContractSays(config, RandomSources(config, 7, 0, random));
}

// Sources whose tokens all have the experts `idx`.
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

TEST(UnpackExpertsTest, NoTokensAnywhere) {
  const Config config = SmallConfig();
  ExpectExpertsAsTheContractSays(config, SameExperts(config, 0, {0}));
}

TEST(UnpackExpertsTest, MinusOneEverywhere) {
  const Config config = SmallConfig();
  ExpectExpertsAsTheContractSays(config, SameExperts(config, 20, {-1}));
}

TEST(UnpackExpertsTest, TheSameExpertTwice) {
  const Config config = SmallConfig();
  ExpectExpertsAsTheContractSays(config, SameExperts(config, 20, {2, 2, 5}));
}

TEST(UnpackExpertsTest, EveryRowToOneExpert) {
  const Config config = SmallConfig();
  ExpectExpertsAsTheContractSays(config, SameExperts(config, 20, {3}));
}

TEST(UnpackExpertsTest, CapacityExactlyFullOneShortAndZero) {
  Config config = SmallConfig();
  // Ranks 0 and 1 receive 60 rows of one expert and 120 of another; rank 2 nothing.
  const std::vector<Source> sources = SameExperts(config, 20, {0, 2, 2});
  for (const int64_t capacity : {120, 119, 60, 59, 1, 0}) {
    config.recv_capacity = capacity;
    ASSERT_NO_FATAL_FAILURE(ExpectExpertsAsTheContractSays(config, sources));
  }
}

TEST(UnpackExpertsTest, WritesThePaddingOfEveryGroup) {
  Config config = SmallConfig();
  config.expert_alignment = 64;
  config.recv_capacity = 130;
  ExpectExpertsAsTheContractSays(config, SameExperts(config, 5, {0, 1, 2}));
}

TEST(UnpackExpertsTest, GroupsOfOneSize) {
  Random random;
  Config config = SmallConfig();
  for (const int64_t capacity : {1, 7, 40}) {
    config.expert_capacity = capacity;
    config.recv_capacity = config.num_local_experts() * capacity;
    ExpectExpertsAsTheContractSays(config, RandomSources(config, 30, 0, random));
  }
}

TEST(UnpackExpertsTest, RowsOfAnotherWidthAreAFault) {
  Random random;
  const Config config = SmallConfig();
  const std::vector<Source> sources = RandomSources(config, 30, 0, random);
  BlockPool pool = PoisonedPool(config);
  Source other{.values_bytes = 32};
  Experts experts = PoisonedExperts(config, other, 0);
  const auto fault =
      UnpackExperts(config, DispatchMessages(config, sources, 0, pool), OutOf(other, experts));
  ASSERT_TRUE(fault.has_value());
  EXPECT_EQ(fault->peer, 0);
}

// -------------------------------------------------------------------------------------- tokens

// All that UnpackTokens writes.
struct Tokens {
  std::vector<std::byte> values = {}, scales = {};
  std::vector<int32_t> topk_idx = {};
  std::vector<float> topk_weights = {};
  std::vector<int32_t> counts = {}, num_tokens = {};
  std::vector<int32_t> rows = {}, num_rows_from = {};
};

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

void ExpectTokensAsTheContractSays(const Config& config, const std::vector<Source>& sources) {
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    const Tokens expected = ExpectedTokens(config, sources, rank);
    for (const int poison : kPoisons) {
      BlockPool pool = PoisonedPool(config, config.ep_size, poison);
      Tokens seen = PoisonedTokens(config, sources[0], poison);
      const auto messages = DispatchMessages(config, sources, rank, pool);
      ASSERT_FALSE(UnpackTokens(config, messages, OutOf(sources[0], seen)).has_value());
      ASSERT_EQ(seen.num_tokens, expected.num_tokens);
      ASSERT_EQ(seen.counts, expected.counts);
      ASSERT_EQ(seen.topk_idx, expected.topk_idx);
      ASSERT_EQ(seen.topk_weights, expected.topk_weights);
      ASSERT_EQ(seen.rows, expected.rows);
      ASSERT_EQ(seen.num_rows_from, expected.num_rows_from);
      ASSERT_EQ(seen.values, expected.values);
      ASSERT_EQ(seen.scales, expected.scales);
    }
  }
}

TEST(UnpackTokensTest, RandomRouting) {
  Random random;
  const Config config = SmallConfig();
  for (int i = 0; i < 40; ++i) {
    ASSERT_NO_FATAL_FAILURE(
        ExpectTokensAsTheContractSays(config, RandomSources(config, 30, 0, random)));
  }
}

TEST(UnpackTokensTest, ScalesTravelBesideValues) {
  Random random(2);
  const Config config = SmallConfig();
  ExpectTokensAsTheContractSays(config, RandomSources(config, 24, 8, random));
}

TEST(UnpackTokensTest, NoTokensAnywhere) {
  const Config config = SmallConfig();
  ExpectTokensAsTheContractSays(config, SameExperts(config, 0, {0}));
}

TEST(UnpackTokensTest, MinusOneEverywhere) {
  const Config config = SmallConfig();
  ExpectTokensAsTheContractSays(config, SameExperts(config, 20, {-1}));
}

TEST(UnpackTokensTest, EveryTokenOfEveryRankFits) {
  const Config config = SmallConfig();
  ExpectTokensAsTheContractSays(config, SameExperts(config, 20, {0, 2, 4}));
}

TEST(UnpackTokensTest, RowsOfAnotherWidthAreAFault) {
  Random random;
  const Config config = SmallConfig();
  const std::vector<Source> sources = RandomSources(config, 30, 0, random);
  BlockPool pool = PoisonedPool(config);
  Source other{.values_bytes = 32};
  Tokens tokens = PoisonedTokens(config, other, 0);
  EXPECT_TRUE(UnpackTokens(config, DispatchMessages(config, sources, 0, pool), OutOf(other, tokens))
                  .has_value());
}

// --------------------------------------------------------------------------------- a float8 wire

// 130 columns, which have two scales.
constexpr Matrix kQuantized{DType::kBFloat16, 130};

Config QuantizedConfig() {
  Config config = SmallConfig();
  config.row_bytes = kQuantized.row_bytes();
  config.recv_capacity = 50;
  config.expert_alignment = 4;
  return config;
}

// What rows that arrived as pairs are dequantised to.
std::vector<std::byte> Dequantized(const std::vector<std::byte>& values,
                                   const std::vector<std::byte>& scales) {
  const int64_t scale_bytes = QuantizedRowBytes(kQuantized) - kQuantized.hidden;
  const int64_t num_rows = static_cast<int64_t>(values.size()) / kQuantized.hidden;
  std::vector<std::byte> rows(num_rows * kQuantized.row_bytes());
  for (int64_t row = 0; row < num_rows; ++row) {
    std::vector<std::byte> wire;
    Append(values, row, kQuantized.hidden, wire);
    Append(scales, row, scale_bytes, wire);
    DequantizeRow(kQuantized, wire.data(), rows.data() + row * kQuantized.row_bytes());
  }
  return rows;
}

// Any bytes as pairs, so that the scales are of all kinds.
std::vector<Source> QuantizedSources(const Config& config) {
  Random random(8);
  return RandomSources(config, kQuantized.hidden, QuantizedRowBytes(kQuantized) - kQuantized.hidden,
                       random);
}

TEST(UnpackExpertsTest, DequantizesWhatArrivesAsPairs) {
  const Config config = QuantizedConfig();
  const std::vector<Source> sources = QuantizedSources(config);
  const Source like{.values_bytes = kQuantized.row_bytes()};
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    const Experts pairs = UnpackedExperts(config, sources, rank, kPoisons[0]);
    BlockPool pool = PoisonedPool(config);
    Experts seen = PoisonedExperts(config, like, kPoisons[0]);
    ExpertsOut out = OutOf(like, seen);
    out.dequantized = kQuantized;
    const auto messages = DispatchMessages(config, sources, rank, pool);
    ASSERT_FALSE(UnpackExperts(config, messages, out).has_value());
    ASSERT_EQ(seen.values, Dequantized(pairs.values, pairs.scales));
    ASSERT_EQ(seen.rows, pairs.rows);
    ASSERT_EQ(seen.weights, pairs.weights);
  }
}

TEST(UnpackTokensTest, DequantizesWhatArrivesAsPairs) {
  const Config config = QuantizedConfig();
  const std::vector<Source> sources = QuantizedSources(config);
  const Source like{.values_bytes = kQuantized.row_bytes()};
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    const Tokens pairs = ExpectedTokens(config, sources, rank);
    BlockPool pool = PoisonedPool(config);
    Tokens seen = PoisonedTokens(config, like, kPoisons[0]);
    TokensOut out = OutOf(like, seen);
    out.dequantized = kQuantized;
    const auto messages = DispatchMessages(config, sources, rank, pool);
    ASSERT_FALSE(UnpackTokens(config, messages, out).has_value());
    ASSERT_EQ(seen.values, Dequantized(pairs.values, pairs.scales));
    ASSERT_EQ(seen.rows, pairs.rows);
    ASSERT_EQ(seen.topk_idx, pairs.topk_idx);
  }
}

TEST(UnpackTokensTest, RowsThatWereNotQuantizedAreAFault) {
  const Config config = QuantizedConfig();
  Random random;
  const std::vector<Source> sources = RandomSources(config, kQuantized.row_bytes(), 0, random);
  BlockPool pool = PoisonedPool(config);
  Tokens tokens = PoisonedTokens(config, sources[0], 0);
  TokensOut out = OutOf(sources[0], tokens);
  out.dequantized = kQuantized;
  EXPECT_TRUE(UnpackTokens(config, DispatchMessages(config, sources, 0, pool), out).has_value());
}

}  // namespace
}  // namespace jax_sm_free
