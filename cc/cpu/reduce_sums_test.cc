#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cc/cpu/reduce.h"
#include "cc/cpu/reduce_testing.h"
#include "cc/cpu/testing.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using testing::AllMatrices;
using testing::Elements;
using testing::ExpectBits;
using ::testing::IsSubstring;
using testing::MessageOf;
using testing::NameOfMatrix;
using testing::Normals;
using testing::Poisoned;
using testing::Random;
using testing::RandomSource;
using testing::ReduceTest;
using testing::Source;
using testing::Visits;

INSTANTIATE_TEST_SUITE_P(All, ReduceTest, AllMatrices(), NameOfMatrix);

// What ranks send back for the tokens of `source`, and the sums of these tokens.
struct Returned {
  std::vector<Message> messages;
  std::vector<float> sums;          // [num_tokens, hidden]
  std::vector<float> weight_grads;  // [num_tokens, top_k]
};

Returned RandomReturned(const Config& config, const Matrix& matrix, Kind kind, const Source& source,
                        BlockPool& pool, Random& random) {
  Returned made{.messages = {},
                .sums = std::vector<float>(source.num_tokens * matrix.hidden, 0.0F),
                .weight_grads = std::vector<float>(source.num_tokens * config.top_k, 0.0F)};
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    std::vector<int64_t> tokens;
    for (int64_t t = 0; t < source.num_tokens; ++t) {
      if (Visits(config, source, t, rank)) tokens.push_back(t);
    }
    const auto num_rows = static_cast<int64_t>(tokens.size());
    const Elements values(matrix, Normals(num_rows * matrix.hidden, random));
    made.messages.push_back(MessageOf(config, kind, matrix, values.loaded, pool));
    for (int64_t i = 0; i < num_rows; ++i) {
      for (int64_t c = 0; c < matrix.hidden; ++c) {
        volatile float total = made.sums[tokens[i] * matrix.hidden + c];
        total = total + values.at(i, c);
        made.sums[tokens[i] * matrix.hidden + c] = total;
      }
      if (kind != Kind::kDispatchBackward) continue;
      for (int32_t k = 0; k < config.top_k; ++k) {
        const float grad = random.Normal();
        made.messages.back().weight()[i * config.top_k + k] = grad;
        const int64_t entry = tokens[i] * config.top_k + k;
        const int32_t expert = source.idx[entry];
        if (expert >= 0 && expert / config.num_local_experts() == rank) {
          made.weight_grads[entry] = grad;
        }
      }
    }
  }
  return made;
}

TEST_P(ReduceTest, SumOverRanksAddsInTheOrderOfRanks) {
  const Source source = RandomSource(config_, config_.max_tokens, 0, 0, random_);
  const Returned returned =
      RandomReturned(config_, matrix_, Kind::kCombine, source, pool_, random_);
  auto out = Poisoned<std::byte>(source.num_tokens * matrix_.row_bytes());
  ASSERT_FALSE(SumOverRanks(config_, matrix_, source.topk(), returned.messages,
                            {out.data(), matrix_.row_bytes()}, nullptr)
                   .has_value());
  ExpectBits(matrix_, out.data(), returned.sums);
}

TEST_P(ReduceTest, SumOverRanksGathersWeightGradients) {
  const Source source = RandomSource(config_, config_.max_tokens, 0, 0, random_);
  const Returned returned =
      RandomReturned(config_, matrix_, Kind::kDispatchBackward, source, pool_, random_);
  auto out = Poisoned<std::byte>(source.num_tokens * matrix_.row_bytes());
  auto weight_grads = Poisoned<float>(source.num_tokens * config_.top_k);
  ASSERT_FALSE(SumOverRanks(config_, matrix_, source.topk(), returned.messages,
                            {out.data(), matrix_.row_bytes()}, weight_grads.data())
                   .has_value());
  ExpectBits(matrix_, out.data(), returned.sums);
  EXPECT_EQ(weight_grads, returned.weight_grads);
}

TEST_P(ReduceTest, SumOverRanksOfNothingIsZero) {
  Source source = RandomSource(config_, config_.max_tokens, 0, 0, random_);
  std::fill(source.idx.begin(), source.idx.end(), -1);
  const Returned returned =
      RandomReturned(config_, matrix_, Kind::kCombine, source, pool_, random_);
  auto out = Poisoned<std::byte>(source.num_tokens * matrix_.row_bytes());
  ASSERT_FALSE(SumOverRanks(config_, matrix_, source.topk(), returned.messages,
                            {out.data(), matrix_.row_bytes()}, nullptr)
                   .has_value());
  EXPECT_EQ(out, std::vector<std::byte>(out.size()));
}

TEST_P(ReduceTest, SumOverRanksWithoutTokens) {
  const Source source = RandomSource(config_, 0, 0, 0, random_);
  const Returned returned =
      RandomReturned(config_, matrix_, Kind::kCombine, source, pool_, random_);
  EXPECT_FALSE(
      SumOverRanks(config_, matrix_, source.topk(), returned.messages, {}, nullptr).has_value());
}

TEST_P(ReduceTest, SumOverRanksRefusesMessagesOfOtherTokens) {
  Source source = RandomSource(config_, config_.max_tokens, 0, 0, random_);
  const Returned returned =
      RandomReturned(config_, matrix_, Kind::kCombine, source, pool_, random_);
  source.idx.assign(source.idx.size(), 7);  // all on the last rank
  auto out = Poisoned<std::byte>(source.num_tokens * matrix_.row_bytes());
  const auto fault = SumOverRanks(config_, matrix_, source.topk(), returned.messages,
                                  {out.data(), matrix_.row_bytes()}, nullptr);
  ASSERT_TRUE(fault.has_value());
  EXPECT_EQ(fault->peer, 0);
  EXPECT_PRED_FORMAT2(IsSubstring, "0 rows of", fault->expected);
}

TEST_P(ReduceTest, SumOverRanksRefusesRowsOfAnotherWidth) {
  const Source source = RandomSource(config_, config_.max_tokens, 0, 0, random_);
  const Returned returned =
      RandomReturned(config_, matrix_, Kind::kCombine, source, pool_, random_);
  const Matrix wider{.dtype = matrix_.dtype, .hidden = matrix_.hidden + 1};
  EXPECT_TRUE(
      SumOverRanks(config_, wider, source.topk(), returned.messages, {}, nullptr).has_value());
}

}  // namespace
}  // namespace jax_sm_free
