#include "cc/cpu/reduce.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <utility>

#include "cc/cpu/testing.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using ::testing::Combine;
using testing::Decode;
using testing::Encode;
using ::testing::IsSubstring;
using testing::Poisoned;
using testing::PoisonedPool;
using testing::Random;
using testing::RandomSource;
using testing::Rounded;
using testing::Source;
using ::testing::Values;
using testing::Visits;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

Config ConfigFor(const Matrix& matrix) {
  return {.ep_size = 4,
          .num_experts = 8,
          .top_k = 3,
          .max_tokens = 12,
          .recv_capacity = 100,
          .row_bytes = matrix.row_bytes()};
}

std::vector<float> Normals(int64_t size, Random& random) {
  std::vector<float> values(size);
  for (float& value : values) value = random.Normal();
  return values;
}

// Whole numbers so small that no sum of their products is ever rounded.
std::vector<float> SmallIntegers(int64_t size, Random& random) {
  std::vector<float> values(size);
  for (float& value : values) value = static_cast<float>(random.Below(9) - 4);
  return values;
}

// A matrix's elements, as they are stored.
struct Elements {
  Elements(const Matrix& matrix, const std::vector<float>& values)
      : hidden(matrix.hidden),
        stored(Encode(matrix.dtype, values)),
        loaded(Decode(matrix.dtype, stored.data(), static_cast<int64_t>(values.size()))) {}

  float at(int64_t row, int64_t column) const { return loaded[row * hidden + column]; }

  int64_t hidden;
  std::vector<std::byte> stored;
  std::vector<float> loaded;
};

// Equality of bits: zeros of either sign differ, and NaNs are equal.
void ExpectBits(const Matrix& matrix, const std::byte* seen, const std::vector<float>& expected) {
  const std::vector<std::byte> stored = Encode(matrix.dtype, expected);
  if (std::memcmp(seen, stored.data(), stored.size()) == 0) return;
  const auto values = Decode(matrix.dtype, seen, static_cast<int64_t>(expected.size()));
  for (size_t i = 0; i < expected.size(); ++i) {
    ASSERT_EQ(std::bit_cast<uint32_t>(values[i]),
              std::bit_cast<uint32_t>(Rounded(matrix.dtype, expected[i])))
        << "element " << i << ": " << values[i] << ", not " << expected[i];
  }
}

// A layout, owned. `rows` are distinct, or -1.
struct OwnedLayout {
  std::vector<int32_t> rows;           // [R, fanout]
  std::vector<int32_t> num_rows_from;  // [ep_size]
  int32_t fanout = 1;
  int64_t num_rows = 0;

  LayoutIn in() const { return {rows.data(), num_rows_from.data(), fanout, num_rows}; }
  int64_t num_token_rows() const {
    int64_t sum = 0;
    for (const int32_t rows_from : num_rows_from) sum += rows_from;
    return sum;
  }
};

OwnedLayout RandomLayout(const Config& config, int32_t fanout, Random& random) {
  OwnedLayout layout{
      .rows = Poisoned<int32_t>(config.max_recv_tokens() * fanout, 0x5A),  // past the end: unread
      .num_rows_from = {},
      .fanout = fanout,
      .num_rows = config.max_recv_tokens() * fanout};
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    layout.num_rows_from.push_back(random.Below(config.max_tokens + 1));
  }
  std::vector<int32_t> shuffled(layout.num_rows);
  for (int32_t row = 0; row < layout.num_rows; ++row) shuffled[row] = row;
  for (int64_t i = 0; i < layout.num_rows; ++i) {
    std::swap(shuffled[i], shuffled[random.Below(layout.num_rows)]);
  }
  for (int64_t i = 0; i < layout.num_token_rows() * fanout; ++i) {
    layout.rows[i] = random.Chance(0.3) ? -1 : shuffled[i];
  }
  return layout;
}

// One row per message row: what PackSums hands to a rank.
Message MessageOf(const Config& config, Kind kind, const Matrix& matrix,
                  const std::vector<float>& values, BlockPool& pool) {
  const auto num_rows = static_cast<int32_t>(values.size() / matrix.hidden);
  Message message(
      pool.Take(), config,
      {.kind = static_cast<int32_t>(kind), .num_rows = num_rows, .row_bytes = matrix.row_bytes()});
  const std::vector<std::byte> stored = Encode(matrix.dtype, values);
  for (int32_t i = 0; i < num_rows; ++i) {
    std::memcpy(message.row(i), stored.data() + i * matrix.row_bytes(), matrix.row_bytes());
  }
  return message;
}

std::string NameOf(const ::testing::TestParamInfo<std::tuple<DType, int>>& info) {
  constexpr const char* kNames[] = {"Float32", "BFloat16", "Float16"};
  const auto& [dtype, hidden] = info.param;
  return std::string(kNames[static_cast<int>(dtype)]) + "x" + std::to_string(hidden);
}

class ReduceTest : public ::testing::TestWithParam<std::tuple<DType, int>> {
 protected:
  Matrix matrix_{.dtype = std::get<0>(GetParam()), .hidden = std::get<1>(GetParam())};
  Config config_ = ConfigFor(matrix_);
  Random random_;
  BlockPool pool_ = PoisonedPool(config_);
};

INSTANTIATE_TEST_SUITE_P(All, ReduceTest,
                         Combine(Values(DType::kFloat32, DType::kBFloat16, DType::kFloat16),
                                 Values(1, 7, 511, 513)),
                         NameOf);

// ------------------------------------------------------------------------------------- PackSums

// Rows that no token names hold NaN, which must not leak.
std::vector<float> ValuesOfNamedRows(const OwnedLayout& layout, int64_t hidden, Random& random) {
  std::vector<float> values(layout.num_rows * hidden, kNan);
  for (int64_t i = 0; i < layout.num_token_rows() * layout.fanout; ++i) {
    if (layout.rows[i] < 0) continue;
    const std::vector<float> row = Normals(hidden, random);
    std::copy(row.begin(), row.end(), values.begin() + layout.rows[i] * hidden);
  }
  return values;
}

// The sum of the contract, for one element.
float SumInOrder(const int32_t* rows, int32_t fanout, const Elements& y,
                 const std::vector<float>& weights, int64_t column) {
  volatile float total = 0;  // rounded at every step
  for (int32_t k = 0; k < fanout; ++k) {
    if (rows[k] < 0) continue;
    const volatile float product =
        weights.empty() ? y.at(rows[k], column) : weights[rows[k]] * y.at(rows[k], column);
    total = total + product;
  }
  return total;
}

void ExpectSumsInOrder(const Config& config, const Matrix& matrix, int32_t fanout, bool weighted,
                       BlockPool& pool, Random& random) {
  const OwnedLayout layout = RandomLayout(config, fanout, random);
  const Elements y(matrix, ValuesOfNamedRows(layout, matrix.hidden, random));
  const std::vector<float> weights =
      weighted ? Normals(layout.num_rows, random) : std::vector<float>();
  const std::vector<Message> messages =
      PackSums(config, Kind::kCombine, matrix, y.stored.data(), weighted ? weights.data() : nullptr,
               nullptr, layout.in(), pool);

  ASSERT_EQ(static_cast<int32_t>(messages.size()), config.ep_size);
  const int32_t* rows = layout.rows.data();
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    ASSERT_FALSE(CheckMessage(messages[rank], rank, layout.num_rows_from[rank], matrix.row_bytes())
                     .has_value());
    for (int32_t i = 0; i < layout.num_rows_from[rank]; ++i, rows += fanout) {
      std::vector<float> expected(matrix.hidden);
      for (int64_t c = 0; c < matrix.hidden; ++c) {
        expected[c] = SumInOrder(rows, fanout, y, weights, c);
      }
      ASSERT_NO_FATAL_FAILURE(ExpectBits(matrix, messages[rank].row(i), expected));
    }
  }
}

TEST_P(ReduceTest, PackSumsAddsWeightedRowsInOrder) {
  ExpectSumsInOrder(config_, matrix_, /*fanout=*/3, /*weighted=*/true, pool_, random_);
}

TEST_P(ReduceTest, PackSumsAddsPlainRowsInOrder) {
  ExpectSumsInOrder(config_, matrix_, /*fanout=*/3, /*weighted=*/false, pool_, random_);
}

TEST_P(ReduceTest, PackSumsWithAFanoutOfOne) {
  ExpectSumsInOrder(config_, matrix_, /*fanout=*/1, /*weighted=*/true, pool_, random_);
  ExpectSumsInOrder(config_, matrix_, /*fanout=*/1, /*weighted=*/false, pool_, random_);
}

TEST_P(ReduceTest, PackSumsWithALargeFanout) {
  ExpectSumsInOrder(config_, matrix_, /*fanout=*/9, /*weighted=*/true, pool_, random_);
}

TEST_P(ReduceTest, PackSumsOfNoRowsIsZero) {
  OwnedLayout layout = RandomLayout(config_, 3, random_);
  std::fill(layout.rows.begin(), layout.rows.end(), -1);
  const Elements y(matrix_, std::vector<float>(layout.num_rows * matrix_.hidden, kNan));
  const std::vector<Message> messages = PackSums(config_, Kind::kCombine, matrix_, y.stored.data(),
                                                 nullptr, nullptr, layout.in(), pool_);
  for (int32_t rank = 0; rank < config_.ep_size; ++rank) {
    for (int32_t i = 0; i < layout.num_rows_from[rank]; ++i) {
      ExpectBits(matrix_, messages[rank].row(i), std::vector<float>(matrix_.hidden, 0.0F));
    }
  }
}

TEST_P(ReduceTest, PackSumsCarriesWeightGradients) {
  const OwnedLayout layout = RandomLayout(config_, config_.top_k, random_);
  const Elements x_grad(matrix_, ValuesOfNamedRows(layout, matrix_.hidden, random_));
  const auto weight_grads = Normals(config_.max_recv_tokens() * config_.top_k, random_);
  const std::vector<Message> messages =
      PackSums(config_, Kind::kDispatchBackward, matrix_, x_grad.stored.data(), nullptr,
               weight_grads.data(), layout.in(), pool_);
  const float* expected = weight_grads.data();
  for (int32_t rank = 0; rank < config_.ep_size; ++rank) {
    const int64_t num_entries = int64_t{layout.num_rows_from[rank]} * config_.top_k;
    EXPECT_TRUE(std::equal(expected, expected + num_entries, messages[rank].weight()));
    expected += num_entries;
  }
}

TEST(PackSumsTest, TheOrderOfAdditionsShows) {
  const Matrix matrix{.hidden = 1};
  const Config config{.num_experts = 3, .top_k = 3, .max_tokens = 1, .row_bytes = 4};
  BlockPool pool = PoisonedPool(config);
  const Elements y(matrix, {1.0F, 1e8F, -1e8F});
  const auto sum = [&](std::vector<int32_t> rows) {
    const OwnedLayout layout{
        .rows = std::move(rows), .num_rows_from = {1}, .fanout = 3, .num_rows = 3};
    const auto messages = PackSums(config, Kind::kCombine, matrix, y.stored.data(), nullptr,
                                   nullptr, layout.in(), pool);
    return Decode(DType::kFloat32, messages[0].row(0), 1)[0];
  };
  EXPECT_EQ(sum({0, 1, 2}), 0.0F);  // 1 is lost in 1e8
  EXPECT_EQ(sum({1, 2, 0}), 1.0F);
}

// --------------------------------------------------------------------------------- SumOverRanks

// What ranks send back for the tokens of `source`, and what the token's sums are.
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
  ASSERT_FALSE(SumOverRanks(config_, matrix_, source.topk(), returned.messages, out.data(), nullptr)
                   .has_value());
  ExpectBits(matrix_, out.data(), returned.sums);
}

TEST_P(ReduceTest, SumOverRanksGathersWeightGradients) {
  const Source source = RandomSource(config_, config_.max_tokens, 0, 0, random_);
  const Returned returned =
      RandomReturned(config_, matrix_, Kind::kDispatchBackward, source, pool_, random_);
  auto out = Poisoned<std::byte>(source.num_tokens * matrix_.row_bytes());
  auto weight_grads = Poisoned<float>(source.num_tokens * config_.top_k);
  ASSERT_FALSE(SumOverRanks(config_, matrix_, source.topk(), returned.messages, out.data(),
                            weight_grads.data())
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
  ASSERT_FALSE(SumOverRanks(config_, matrix_, source.topk(), returned.messages, out.data(), nullptr)
                   .has_value());
  EXPECT_EQ(out, std::vector<std::byte>(out.size()));
}

TEST_P(ReduceTest, SumOverRanksWithoutTokens) {
  const Source source = RandomSource(config_, 0, 0, 0, random_);
  const Returned returned =
      RandomReturned(config_, matrix_, Kind::kCombine, source, pool_, random_);
  EXPECT_FALSE(SumOverRanks(config_, matrix_, source.topk(), returned.messages, nullptr, nullptr)
                   .has_value());
}

TEST_P(ReduceTest, SumOverRanksRefusesMessagesOfOtherTokens) {
  Source source = RandomSource(config_, config_.max_tokens, 0, 0, random_);
  const Returned returned =
      RandomReturned(config_, matrix_, Kind::kCombine, source, pool_, random_);
  source.idx.assign(source.idx.size(), 7);  // all on the last rank
  auto out = Poisoned<std::byte>(source.num_tokens * matrix_.row_bytes());
  const auto fault =
      SumOverRanks(config_, matrix_, source.topk(), returned.messages, out.data(), nullptr);
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
      SumOverRanks(config_, wider, source.topk(), returned.messages, nullptr, nullptr).has_value());
}

// ------------------------------------------------------------------------------ SpreadGradients

// Gradients of token rows, and what they make of y's and weights' gradients.
struct Spread {
  OwnedLayout layout;
  std::vector<Message> messages;
  std::vector<float> y_grad;        // [num_rows, hidden]
  std::vector<float> weight_grads;  // [num_rows]
};

Spread SpreadByHand(const Config& config, const Matrix& matrix, const Elements& y,
                    const std::vector<float>& weights, BlockPool& pool, Random& random) {
  Spread spread{.layout = RandomLayout(config, config.top_k, random),
                .messages = {},
                .y_grad = {},
                .weight_grads = {}};
  spread.y_grad.assign(spread.layout.num_rows * matrix.hidden, 0.0F);
  spread.weight_grads.assign(spread.layout.num_rows, 0.0F);
  const int32_t* rows = spread.layout.rows.data();
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    const int32_t num_rows = spread.layout.num_rows_from[rank];
    const Elements grads(matrix, SmallIntegers(num_rows * matrix.hidden, random));
    spread.messages.push_back(
        MessageOf(config, Kind::kCombineBackward, matrix, grads.loaded, pool));
    for (int64_t i = 0; i < int64_t{num_rows} * config.top_k; ++i, ++rows) {
      if (*rows < 0) continue;
      for (int64_t c = 0; c < matrix.hidden; ++c) {
        const float grad = grads.at(i / config.top_k, c);
        const float weight = weights.empty() ? 1.0F : weights[*rows];
        spread.y_grad[*rows * matrix.hidden + c] = weight * grad;
        spread.weight_grads[*rows] += grad * y.at(*rows, c);
      }
    }
  }
  return spread;
}

TEST_P(ReduceTest, SpreadGradientsScalesRowsAndDotsThemWithY) {
  const int64_t num_rows = config_.max_recv_tokens() * config_.top_k;
  const Elements y(matrix_, SmallIntegers(num_rows * matrix_.hidden, random_));
  std::vector<float> weights = Normals(num_rows, random_);
  weights[3] = 0;  // its gradient is not
  const Spread expected = SpreadByHand(config_, matrix_, y, weights, pool_, random_);
  auto y_grad = Poisoned<std::byte>(num_rows * matrix_.row_bytes());
  auto weight_grads = Poisoned<float>(num_rows);
  ASSERT_FALSE(SpreadGradients(config_, matrix_, expected.messages, expected.layout.in(),
                               y.stored.data(), weights.data(), y_grad.data(), weight_grads.data())
                   .has_value());
  ExpectBits(matrix_, y_grad.data(), expected.y_grad);
  EXPECT_EQ(weight_grads, expected.weight_grads);
}

TEST_P(ReduceTest, SpreadGradientsWithoutWeightsCopiesRows) {
  const int64_t num_rows = config_.max_recv_tokens() * config_.top_k;
  const Elements y(matrix_, std::vector<float>(num_rows * matrix_.hidden, kNan));
  const Spread expected = SpreadByHand(config_, matrix_, y, {}, pool_, random_);
  auto y_grad = Poisoned<std::byte>(num_rows * matrix_.row_bytes());
  ASSERT_FALSE(SpreadGradients(config_, matrix_, expected.messages, expected.layout.in(), nullptr,
                               nullptr, y_grad.data(), nullptr)
                   .has_value());
  ExpectBits(matrix_, y_grad.data(), expected.y_grad);
}

TEST_P(ReduceTest, SpreadGradientsOfRandomNumbersIsCloseAndRepeats) {
  const OwnedLayout layout{.rows = {1}, .num_rows_from = {1, 0, 0, 0}, .num_rows = 2};
  const Elements y(matrix_, Normals(2 * matrix_.hidden, random_));
  const Elements grads(matrix_, Normals(matrix_.hidden, random_));
  std::vector<Message> messages;
  messages.push_back(MessageOf(config_, Kind::kCombineBackward, matrix_, grads.loaded, pool_));
  for (int i = 0; i < 3; ++i) {
    messages.push_back(MessageOf(config_, Kind::kCombineBackward, matrix_, {}, pool_));
  }
  const std::vector<float> weights{0.0F, 0.37F};
  const auto dot = [&] {
    auto y_grad = Poisoned<std::byte>(2 * matrix_.row_bytes());
    auto weight_grads = Poisoned<float>(2);
    EXPECT_FALSE(SpreadGradients(config_, matrix_, messages, layout.in(), y.stored.data(),
                                 weights.data(), y_grad.data(), weight_grads.data())
                     .has_value());
    return weight_grads[1];
  };
  double expected = 0;
  for (int64_t c = 0; c < matrix_.hidden; ++c) expected += double{grads.at(0, c)} * y.at(1, c);
  const float first = dot();
  EXPECT_NEAR(first, expected, 1e-5 * static_cast<double>(matrix_.hidden));
  for (int i = 0; i < 5; ++i) EXPECT_EQ(dot(), first);
}

TEST_P(ReduceTest, SpreadGradientsRefusesAMessageOfOtherRows) {
  const int64_t num_rows = config_.max_recv_tokens() * config_.top_k;
  const Elements y(matrix_, std::vector<float>(num_rows * matrix_.hidden, 0.0F));
  Spread spread = SpreadByHand(config_, matrix_, y, {}, pool_, random_);
  spread.layout.num_rows_from[2] = (spread.layout.num_rows_from[2] + 1) % config_.max_tokens;
  auto y_grad = Poisoned<std::byte>(num_rows * matrix_.row_bytes());
  const auto fault = SpreadGradients(config_, matrix_, spread.messages, spread.layout.in(), nullptr,
                                     nullptr, y_grad.data(), nullptr);
  ASSERT_TRUE(fault.has_value());
  EXPECT_EQ(fault->peer, 2);
}

// ---------------------------------------------------------------------------------------- Check

class CheckTest : public ::testing::Test {
 protected:
  Config config_ = ConfigFor({.hidden = 4});
  Random random_;
  OwnedLayout layout_ = RandomLayout(config_, 3, random_);
};

TEST_F(CheckTest, AcceptsALayout) { EXPECT_FALSE(Check(config_, layout_.in()).has_value()); }

TEST_F(CheckTest, RefusesMoreRowsThanARankHasTokens) {
  layout_.num_rows_from[2] = config_.max_tokens + 1;
  const auto fault = Check(config_, layout_.in());
  ASSERT_TRUE(fault.has_value());
  EXPECT_EQ(fault->peer, 2);
  EXPECT_EQ(fault->seen, "13");
}

TEST_F(CheckTest, RefusesANegativeNumberOfRows) {
  layout_.num_rows_from[0] = -1;
  EXPECT_TRUE(Check(config_, layout_.in()).has_value());
}

TEST_F(CheckTest, RefusesRowsThatAreNotThere) {
  layout_.num_rows_from[0] = 1;
  for (const int64_t row : {layout_.num_rows, int64_t{-2}}) {
    layout_.rows[2] = static_cast<int32_t>(row);
    const auto fault = Check(config_, layout_.in());
    ASSERT_TRUE(fault.has_value());
    EXPECT_EQ(fault->seen, std::to_string(row));
  }
}

TEST_F(CheckTest, DoesNotReadPastTheRowsInUse) {
  layout_.rows.resize(layout_.num_token_rows() * layout_.fanout);
  layout_.rows.shrink_to_fit();
  EXPECT_FALSE(Check(config_, layout_.in()).has_value());
}

}  // namespace
}  // namespace jax_sm_free
