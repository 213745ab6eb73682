#include <cstddef>
#include <cstdint>
#include <vector>

#include "cc/cpu/testing.h"
#include "cc/cpu/unpack.h"
#include "cc/cpu/unpack_testing.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using testing::DispatchMessages;
using testing::ExpectedTokens;
using testing::kPoisons;
using testing::OutOf;
using testing::PoisonedPool;
using testing::PoisonedTokens;
using testing::Random;
using testing::RandomSources;
using testing::SameExperts;
using testing::SmallConfig;
using testing::Source;
using testing::Tokens;

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

}  // namespace
}  // namespace jax_sm_free
