// Several groups: none is through before all have sent.

#include <chrono>
#include <cstdint>
#include <optional>
#include <thread>
#include <vector>

#include "cc/cpu/in_process.h"
#include "cc/cpu/in_process_testing.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using testing::ExpectNotes;
using testing::FaultWith;
using testing::Group;
using testing::IsReady;
using testing::kKey;
using testing::kNever;
using testing::kOtherRun;
using testing::kSameRun;
using testing::kSoon;
using testing::SeenBy;

TEST(InProcessGroupsTest, ARankThatSendsAllAtOnceIsThroughWhenAllGroupsHaveSent) {
  Group group(2, kNever, 2);
  auto first = group.Receive(kKey, 0);
  auto second = group.Receive(kKey, 3);
  for (const int32_t src : {0, 1, 2}) EXPECT_FALSE(group.SendToAll(kKey, src).has_value());
  EXPECT_FALSE(IsReady(first));
  EXPECT_FALSE(group.SendToAll(kKey, 3).has_value());
  ExpectNotes(first.get(), kKey, 0);
  ExpectNotes(second.get(), kKey, 3, 2);
}

TEST(InProcessGroupsTest, ARankIsThroughWhenAllGroupsHaveSent) {
  Group group(2, kNever, 2);
  group.SendAll(kKey, 0);
  EXPECT_FALSE(group.SendOnly(kKey, 2, 2).has_value());
  auto first = group.Receive(kKey, 0);
  auto second = group.Receive(kKey, 2);
  std::this_thread::sleep_for(std::chrono::duration<double>(2 * AllGroups::kPatienceSeconds));
  EXPECT_FALSE(IsReady(first));
  EXPECT_FALSE(group.SendOnly(kKey, 3, 2).has_value());
  ExpectNotes(first.get(), kKey, 0);
  ExpectNotes(second.get(), kKey, 2, 2);
}

TEST(InProcessGroupsTest, AFaultInOneGroupEndsWhoWaitsForItInAnother) {
  Group group(2, kNever, 2);
  group.SendAll(kKey, 0);
  auto arrival = group.Receive(kKey, 0);
  group.transport().Fail(kKey.run, FaultWith("a failure"));
  EXPECT_EQ(SeenBy(arrival.get()), "a failure");
  EXPECT_EQ(SeenBy(group.Receive(kKey, 3).get()), "a failure");
  EXPECT_EQ(group.failed_runs(), std::vector<int64_t>{kKey.run});
}

TEST(InProcessGroupsTest, ATimeoutOfOneGroupIsTheFaultOfAll) {
  Group group(2, kSoon, 2);
  group.SendAll(kKey, 0);
  EXPECT_FALSE(group.SendOnly(kKey, 2, 2).has_value());
  auto through = group.Receive(kKey, 0);
  auto misses = group.Receive(kKey, 2);
  for (auto* arrival : {&through, &misses}) {
    EXPECT_EQ(SeenBy(arrival->get()), "1 after 0.05 s, none from rank 1");
  }
}

TEST(InProcessGroupsTest, AnExchangeThatAnotherGroupHasNotIsWaitedForOnce) {
  Group group(2, kNever, 2);
  for (const ExchangeKey& key : {kKey, kSameRun, kOtherRun}) {
    const auto start = std::chrono::steady_clock::now();
    group.SendAll(key, 0);
    ExpectNotes(group.Receive(key, 0).get(), key, 0);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    if (key == kKey) {
      EXPECT_GE(took.count(), AllGroups::kPatienceSeconds);
    } else {
      EXPECT_LT(took.count(), AllGroups::kPatienceSeconds / 2);
    }
  }
}

TEST(InProcessGroupsTest, AGroupThatComesLateFindsItsMessages) {
  Group group(2, kNever, 2);
  group.SendAll(kKey, 0);
  ExpectNotes(group.Receive(kKey, 0).get(), kKey, 0);
  group.SendAll(kKey, 3);
  ExpectNotes(group.Receive(kKey, 3).get(), kKey, 3, 2);
}

TEST(InProcessGroupsTest, WhoWaitsForAGroupGoesOnWhenItIsLost) {
  Group group(2, kNever, 2);
  group.SendAll(kKey, 0);
  EXPECT_FALSE(group.SendOnly(kKey, 2, 2).has_value());
  auto arrival = group.Receive(kKey, 0);
  group.transport().Lose(3, "it is gone", InProcess::kForEver);
  ExpectNotes(arrival.get(), kKey, 0);
}

}  // namespace
}  // namespace jax_sm_free
