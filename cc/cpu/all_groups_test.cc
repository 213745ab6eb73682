#include "cc/cpu/all_groups.h"

#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

constexpr int32_t kEpSize = 2;
constexpr double kTimeout = 30;
constexpr double kPatience = AllGroups::kPatienceSeconds;
constexpr ExchangeKey kKey{.run = 1, .call_site = 2, .count = 3};
constexpr ExchangeKey kSameSite{.run = 2, .call_site = 2, .count = 3};
constexpr ExchangeKey kOtherSite{.run = 1, .call_site = 4, .count = 3};

class AllGroupsTest : public ::testing::Test {
 protected:
  // Group 0 sends, and waits for group 1 in vain.
  void WaitInVain(const ExchangeKey& key) {
    EXPECT_FALSE(groups_.Add(key, 0, kEpSize));
    EXPECT_GT(groups_.SecondsToWait(key, 0), 0);
    EXPECT_EQ(groups_.SecondsToWait(key, kPatience), 0);
  }

  AllGroups groups_{2, kEpSize, kTimeout};
};

TEST_F(AllGroupsTest, TheLastRankOfAllCompletesAnExchange) {
  EXPECT_FALSE(groups_.Add(kKey, 0, 1));
  EXPECT_FALSE(groups_.Add(kKey, 1, 2));
  EXPECT_FALSE(groups_.Add(kSameSite, 0, 1));
  EXPECT_TRUE(groups_.Add(kKey, 0, 1));
}

TEST_F(AllGroupsTest, AGroupThatHasBegunIsWaitedForUntilItTimesOut) {
  (void)groups_.Add(kKey, 0, kEpSize);
  (void)groups_.Add(kKey, 1, 1);
  EXPECT_GT(groups_.SecondsToWait(kKey, 0), 0);
  EXPECT_GT(groups_.SecondsToWait(kKey, 2 * kTimeout - 1), 0);
  EXPECT_EQ(groups_.SecondsToWait(kKey, 2 * kTimeout), 0);
}

TEST_F(AllGroupsTest, AGroupThatHasNotBegunIsWaitedForWithPatience) {
  (void)groups_.Add(kKey, 0, kEpSize);
  EXPECT_EQ(groups_.SecondsToWait(kKey, 0), kPatience);
  EXPECT_EQ(groups_.SecondsToWait(kKey, kPatience), 0);
}

TEST_F(AllGroupsTest, ACallSiteThatIsNotSharedIsWaitedForOnce) {
  WaitInVain(kKey);
  (void)groups_.Add(kSameSite, 0, kEpSize);
  EXPECT_EQ(groups_.SecondsToWait(kSameSite, 0), 0);
  EXPECT_GT(groups_.SecondsToWait(kOtherSite, 0), 0);
}

TEST_F(AllGroupsTest, AllWaitsInVainTakeAtMostTwiceThePatience) {
  double seconds = 0;
  for (int64_t site = 0; site < 100; ++site) {
    const ExchangeKey key{.run = 0, .call_site = site, .count = 0};
    double waited = 0;
    while (const double more = groups_.SecondsToWait(key, waited)) waited += more;
    seconds += waited;
  }
  EXPECT_LE(seconds, 2 * kPatience);
}

TEST_F(AllGroupsTest, AGroupThatWasOnlyLateIsWaitedForAgain) {
  WaitInVain(kKey);
  EXPECT_TRUE(groups_.Add(kKey, 1, kEpSize));
  (void)groups_.Add(kSameSite, 0, kEpSize);
  EXPECT_EQ(groups_.SecondsToWait(kSameSite, 0), kPatience);
}

TEST_F(AllGroupsTest, AGroupThatIsLateTimeAfterTimeIsNot) {
  WaitInVain(kKey);
  EXPECT_TRUE(groups_.Add(kKey, 1, kEpSize));
  WaitInVain(kSameSite);
  EXPECT_TRUE(groups_.Add(kSameSite, 1, kEpSize));
  EXPECT_EQ(groups_.SecondsToWait(kKey, 0), 0);
}

TEST_F(AllGroupsTest, NobodyWaitsForAGroupThatIsLost) {
  (void)groups_.Add(kKey, 0, kEpSize);
  (void)groups_.Add(kKey, 1, 1);
  groups_.Lose(1);
  EXPECT_EQ(groups_.SecondsToWait(kKey, 0), 0);
  (void)groups_.Add(kSameSite, 0, 1);
  EXPECT_GT(groups_.SecondsToWait(kSameSite, 0), 0);
}

TEST_F(AllGroupsTest, WhatOneGroupAloneSendsIsForgotten) {
  for (int64_t run = 0; run < 10000; ++run) (void)groups_.Add({.run = run}, 0, kEpSize);
  EXPECT_FALSE(groups_.Add({.run = 0}, 1, kEpSize));
  EXPECT_TRUE(groups_.Add({.run = 9999}, 1, kEpSize));
}

}  // namespace
}  // namespace jax_sm_free
