#include "cc/cpu/start_numbers.h"

#include <cstdint>
#include <limits>
#include <optional>

#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

TEST(StartNumbersTest, AnExecutableCountsAsItself) {
  StartNumbers numbers;
  EXPECT_EQ(numbers.Difference({1, 2}, {1, 2}), 0);
  EXPECT_EQ(numbers.Difference({1, 2}, {1, 3}), std::nullopt);
  EXPECT_EQ(numbers.Difference({1, 2}, {2, 2}), std::nullopt);
}

TEST(StartNumbersTest, WhatIsLearnedHoldsBothWays) {
  StartNumbers numbers;
  numbers.Learn({0, 0}, {1, 0}, 1000);
  EXPECT_EQ(numbers.Difference({0, 0}, {1, 0}), 1000);
  EXPECT_EQ(numbers.Difference({1, 0}, {0, 0}), -1000);
}

// Joins pairs in any order, by either of their ends.
TEST(StartNumbersTest, WhatFollowsIsKnown) {
  struct Edge {
    int32_t one, other;
  };
  for (const Edge first : {Edge{0, 1}, Edge{1, 0}}) {
    for (const Edge second : {Edge{2, 3}, Edge{3, 2}}) {
      for (const Edge third : {Edge{0, 2}, Edge{3, 0}, Edge{1, 3}, Edge{2, 1}}) {
        StartNumbers numbers;
        const auto count = [](int32_t process) { return process * process * 100; };
        for (const Edge& edge : {first, second, third}) {
          EXPECT_EQ(numbers.Difference({edge.one, 7}, {edge.other, 7}), std::nullopt);
          numbers.Learn({edge.one, 7}, {edge.other, 7}, count(edge.other) - count(edge.one));
        }
        for (int32_t one = 0; one < 4; ++one) {
          for (int32_t other = 0; other < 4; ++other) {
            EXPECT_EQ(numbers.Difference({one, 7}, {other, 7}), count(other) - count(one));
          }
        }
      }
    }
  }
}

TEST(StartNumbersTest, NumbersWrapAround) {
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  StartNumbers numbers;
  numbers.Learn({0, 0}, {1, 0}, kMost);
  numbers.Learn({1, 0}, {2, 0}, kMost);
  EXPECT_EQ(numbers.Difference({0, 0}, {2, 0}), -2);
}

}  // namespace
}  // namespace jax_sm_free
