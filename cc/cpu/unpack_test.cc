#include "cc/cpu/unpack.h"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "cc/cpu/testing.h"
#include "cc/cpu/unpack_testing.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using testing::Append;
using testing::DispatchMessages;
using testing::ExpertRow;
using testing::Experts;
using testing::kPoisons;
using testing::OutOf;
using testing::Placement;
using testing::PlacementOf;
using testing::PoisonedExperts;
using testing::PoisonedPool;
using testing::Random;
using testing::RandomSource;
using testing::RandomSources;
using testing::SameExperts;
using testing::SmallConfig;
using testing::Source;
using testing::UnpackedExperts;
using testing::Visits;

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

// Compares every element, on every rank, over each kind of poison.
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
  // Ranks 0 and 1 receive 60 rows of one expert and 120 rows of another one. Rank 2 receives
  // nothing.
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

}  // namespace
}  // namespace jax_sm_free
