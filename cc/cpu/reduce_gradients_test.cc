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
using testing::kNan;
using testing::MessageOf;
using testing::NameOfMatrix;
using testing::Normals;
using testing::OwnedLayout;
using testing::Poisoned;
using testing::Random;
using testing::RandomLayout;
using testing::ReduceTest;

INSTANTIATE_TEST_SUITE_P(All, ReduceTest, AllMatrices(), NameOfMatrix);

// Whole numbers that are so small that no sum of their products is rounded.
std::vector<float> SmallIntegers(int64_t size, Random& random) {
  std::vector<float> values(size);
  for (float& value : values) value = static_cast<float>(random.Below(9) - 4);
  return values;
}

// Gradients of token rows, and the gradients of y and of the weights that follow from them.
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
  weights[3] = 0;  // its gradient is not 0
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

}  // namespace
}  // namespace jax_sm_free
