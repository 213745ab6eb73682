#include "cc/cpu/reduce.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cc/cpu/reduce_testing.h"
#include "cc/cpu/testing.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using testing::AllMatrices;
using testing::ConfigFor;
using testing::Decode;
using testing::Elements;
using testing::ExpectBits;
using testing::kNan;
using testing::NameOfMatrix;
using testing::Normals;
using testing::OwnedLayout;
using testing::PoisonedPool;
using testing::Random;
using testing::RandomLayout;
using testing::ReduceTest;

INSTANTIATE_TEST_SUITE_P(All, ReduceTest, AllMatrices(), NameOfMatrix);

// Rows that no token names hold NaN, so that a test sees if they are used.
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
  volatile float total = 0;  // `volatile`: rounded at every step
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
