#include "cc/cpu/pack.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <variant>

#include "cc/cpu/testing.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using testing::PoisonedPool;
using testing::Random;
using testing::RandomSource;
using testing::Source;
using testing::Visits;

constexpr Config kConfig{
    .ep_size = 4, .num_experts = 12, .top_k = 3, .max_tokens = 40, .row_bytes = 40};

Route RouteOf(const Config& config, const TopK& topk) {
  return std::get<Route>(Route::Make(config, topk));
}

// Two ranks, with experts 0 and 1, and experts 2 and 3.
constexpr Config kTwoRanks{
    .ep_size = 2, .num_experts = 4, .top_k = 2, .max_tokens = 8, .row_bytes = 8};

TEST(RouteTest, SendsATokenOnceToEachRankOfItsExperts) {
  const std::vector<int32_t> idx{0, 1,   // both experts on rank 0
                                 3, 0,   // one on each
                                 2, 2};  // the same twice
  const Route route = RouteOf(kTwoRanks, {.idx = idx.data(), .num_tokens = 3});
  EXPECT_EQ(route.tokens(0), (std::vector<int32_t>{0, 1}));
  EXPECT_EQ(route.tokens(1), (std::vector<int32_t>{1, 2}));
}

TEST(RouteTest, MinusOneSelectsNone) {
  const std::vector<int32_t> idx{-1, -1, -1, 3, 0, -1};
  const Route route = RouteOf(kTwoRanks, {.idx = idx.data(), .num_tokens = 3});
  EXPECT_EQ(route.tokens(0), (std::vector<int32_t>{2}));
  EXPECT_EQ(route.tokens(1), (std::vector<int32_t>{1}));
}

TEST(RouteTest, MinusOneEverywhereSendsNothing) {
  const std::vector<int32_t> idx(16, -1);
  const Route route = RouteOf(kTwoRanks, {.idx = idx.data(), .num_tokens = 8});
  EXPECT_TRUE(route.tokens(0).empty());
  EXPECT_TRUE(route.tokens(1).empty());
}

TEST(RouteTest, NoTokensSendNothing) {
  const Route route = RouteOf(kTwoRanks, {.idx = nullptr, .num_tokens = 0});
  EXPECT_TRUE(route.tokens(0).empty());
}

TEST(RouteTest, AgreesWithAPlainLoop) {
  Random random;
  for (int i = 0; i < 200; ++i) {
    const Source source = RandomSource(kConfig, random.Below(41), 4, 0, random);
    const Route route = RouteOf(kConfig, source.topk());
    for (int32_t rank = 0; rank < kConfig.ep_size; ++rank) {
      std::vector<int32_t> expected;
      for (int32_t t = 0; t < source.num_tokens; ++t) {
        if (Visits(kConfig, source, t, rank)) expected.push_back(t);
      }
      ASSERT_EQ(route.tokens(rank), expected);
    }
  }
}

TEST(RouteTest, AnIndexOutOfRangeIsAFaultThatNamesIt) {
  for (const int32_t wrong : {4, -2, 1 << 30, -(1 << 30)}) {
    std::vector<int32_t> idx(8, 0);
    idx[5] = wrong;
    const Result<Route> result = Route::Make(kTwoRanks, {.idx = idx.data(), .num_tokens = 4});
    ASSERT_NE(FaultOf(result), nullptr);
    EXPECT_EQ(FaultOf(result)->expected, "topk_idx in [-1, 4)");
    EXPECT_EQ(FaultOf(result)->seen, std::to_string(wrong) + " at token 2, k 1");
  }
}

// Token `t` of the source, as a message holds it.
std::vector<std::byte> WireRow(const Source& source, int64_t t) {
  const auto values = source.values.begin() + t * source.values_bytes;
  const auto scales = source.scales.begin() + t * source.scales_bytes;
  std::vector<std::byte> row(values, values + source.values_bytes);
  row.insert(row.end(), scales, scales + source.scales_bytes);
  return row;
}

void ExpectRows(const Message& message, const Source& source, const std::vector<int32_t>& tokens) {
  ASSERT_EQ(message.header().num_rows, static_cast<int32_t>(tokens.size()));
  ASSERT_EQ(message.header().row_bytes, source.values_bytes + source.scales_bytes);
  for (size_t i = 0; i < tokens.size(); ++i) {
    const std::vector<std::byte> expected = WireRow(source, tokens[i]);
    ASSERT_EQ(std::memcmp(message.row(static_cast<int64_t>(i)), expected.data(), expected.size()),
              0);
  }
}

TEST(PackRowsTest, CopiesTheRowsOfItsTokens) {
  Random random;
  const Source source = RandomSource(kConfig, 9, 13, 0, random);
  BlockPool pool = PoisonedPool(kConfig);
  const std::vector<int32_t> tokens{0, 3, 4, 8};
  ExpectRows(PackRows(kConfig, Kind::kCombineBackward, tokens, source.rows(), pool.Take()), source,
             tokens);
}

TEST(PackRowsTest, PutsScalesBehindTheValuesOfEachRow) {
  Random random;
  const Source source = RandomSource(kConfig, 9, 24, 12, random);
  BlockPool pool = PoisonedPool(kConfig);
  const std::vector<int32_t> tokens{1, 2, 7};
  ExpectRows(PackRows(kConfig, Kind::kCombineBackward, tokens, source.rows(), pool.Take()), source,
             tokens);
}

TEST(PackRowsTest, SaysItsKindAndIsEmptyWithoutTokens) {
  BlockPool pool = PoisonedPool(kConfig);
  const Message message = PackRows(kConfig, Kind::kCombineBackward, {}, ConstRows{}, pool.Take());
  EXPECT_EQ(message.header().kind, static_cast<int32_t>(Kind::kCombineBackward));
  EXPECT_EQ(message.header().num_rows, 0);
}

// The routing of a message, computed by a plain loop over its tokens.
void ExpectRouting(const Config& config, const Message& message, const Source& source,
                   const std::vector<int32_t>& tokens, int32_t dst) {
  const int32_t num_local = config.num_local_experts();
  std::vector<int32_t> counts(num_local, 0);
  int64_t entry = 0;
  for (const int32_t t : tokens) {
    for (int32_t k = 0; k < config.top_k; ++k, ++entry) {
      const int32_t local = source.idx[t * config.top_k + k] - dst * num_local;
      const bool here = local >= 0 && local < num_local;
      ASSERT_EQ(message.local_expert()[entry], here ? local : -1);
      ASSERT_EQ(message.weight()[entry], here ? source.weights[t * config.top_k + k] : 0.0F);
      ASSERT_EQ(message.position()[entry], here ? counts[local]++ : 0);
    }
  }
  for (int32_t e = 0; e < num_local; ++e) ASSERT_EQ(message.rows_per_expert()[e], counts[e]);
}

TEST(PackDispatchTest, AgreesWithAPlainLoop) {
  Random random;
  BlockPool pool = PoisonedPool(kConfig);
  for (int i = 0; i < 100; ++i) {
    const Source source = RandomSource(kConfig, random.Below(41), 30, 10, random);
    const Route route = RouteOf(kConfig, source.topk());
    for (int32_t dst = 0; dst < kConfig.ep_size; ++dst) {
      const Message message =
          PackDispatch(kConfig, route.tokens(dst), source.topk(), dst, source.rows(), pool.Take());
      ASSERT_NO_FATAL_FAILURE(ExpectRows(message, source, route.tokens(dst)));
      ASSERT_NO_FATAL_FAILURE(ExpectRouting(kConfig, message, source, route.tokens(dst), dst));
    }
  }
}

TEST(PackDispatchTest, WritesZeroCountsWithoutTokens) {
  BlockPool pool = PoisonedPool(kConfig);
  const Message message = PackDispatch(kConfig, {}, TopK{}, 1, ConstRows{}, pool.Take());
  EXPECT_EQ(std::count(message.rows_per_expert(), message.rows_per_expert() + 3, 0), 3);
}

TEST(PackDispatchTest, AFullMessageFitsItsBlock) {
  Random random;
  const Source source = RandomSource(kConfig, kConfig.max_tokens, 40, 0, random);
  std::vector<int32_t> tokens(kConfig.max_tokens);
  for (int32_t t = 0; t < kConfig.max_tokens; ++t) tokens[t] = t;
  BlockPool pool(MaxMessageBytes(kConfig));
  const Message message =
      PackDispatch(kConfig, tokens, source.topk(), 0, source.rows(), pool.Take());
  ExpectRows(message, source, tokens);
}

}  // namespace
}  // namespace jax_sm_free
