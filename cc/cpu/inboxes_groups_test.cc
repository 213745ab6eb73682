// Several groups: none is through before all have sent.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <optional>
#include <thread>
#include <vector>

#include "cc/cpu/inboxes.h"
#include "cc/cpu/inboxes_testing.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using testing::ExpectNotes;
using testing::FaultWith;
using testing::Group;
using testing::IsReady;
using testing::kKey;
using testing::kLater;
using testing::kNever;
using testing::kOtherRun;
using testing::kSameRun;
using testing::SeenBy;

TEST(InboxesGroupsTest, ARankThatSendsAllAtOnceIsThroughWhenAllGroupsHaveSent) {
  Group group(2, kNever, 2);
  auto first = group.Receive(kKey, 0);
  auto second = group.Receive(kKey, 3);
  for (const int32_t src : {0, 1, 2}) EXPECT_FALSE(group.SendToAll(kKey, src).has_value());
  EXPECT_FALSE(IsReady(first));
  EXPECT_FALSE(group.SendToAll(kKey, 3).has_value());
  ExpectNotes(first.get(), kKey, 0);
  ExpectNotes(second.get(), kKey, 3, 2);
}

TEST(InboxesGroupsTest, ARankIsThroughWhenAllGroupsHaveSent) {
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

TEST(InboxesGroupsTest, AFaultInOneGroupEndsWhoWaitsForItInAnother) {
  Group group(2, kNever, 2);
  group.SendAll(kKey, 0);
  auto arrival = group.Receive(kKey, 0);
  group.transport().Fail(kKey.run, FaultWith("a failure"));
  EXPECT_EQ(SeenBy(arrival.get()), "a failure");
  EXPECT_EQ(SeenBy(group.Receive(kKey, 3).get()), "a failure");
  EXPECT_EQ(group.failed_runs(), std::vector<int64_t>{kKey.run});
}

TEST(InboxesGroupsTest, ATimeoutOfOneGroupIsTheFaultOfAll) {
  // Rank 0 waits for the other group twice as long, so that this one has timed out before.
  Group group(2, kLater, 2);
  group.SendAll(kKey, 0);
  EXPECT_FALSE(group.SendOnly(kKey, 2, 2).has_value());
  auto misses = group.Receive(kKey, 2);
  auto through = group.Receive(kKey, 0);
  for (auto* arrival : {&through, &misses}) {
    EXPECT_EQ(SeenBy(arrival->get()), "1 after 0.4 s, none from rank 1");
  }
}

double SecondsOfOneGroup(Group& group, const ExchangeKey& key) {
  const auto start = std::chrono::steady_clock::now();
  group.SendAll(key, 0);
  ExpectNotes(group.Receive(key, 0).get(), key, 0);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

TEST(InboxesGroupsTest, AnExchangeThatAnotherGroupHasNotIsWaitedForOnce) {
  constexpr double kQuick = AllGroups::kPatienceSeconds / 2;
  // On a busy machine an exchange may take as long as a wait, but not each time.
  double most = kQuick;
  for (int attempt = 0; attempt < 5 && most >= kQuick; ++attempt) {
    Group group(2, kNever, 2);
    EXPECT_GE(SecondsOfOneGroup(group, kKey), AllGroups::kPatienceSeconds);
    most = std::max(SecondsOfOneGroup(group, kSameRun), SecondsOfOneGroup(group, kOtherRun));
  }
  EXPECT_LT(most, kQuick);
}

TEST(InboxesGroupsTest, AGroupThatComesLateFindsItsMessages) {
  Group group(2, kNever, 2);
  group.SendAll(kKey, 0);
  ExpectNotes(group.Receive(kKey, 0).get(), kKey, 0);
  group.SendAll(kKey, 3);
  ExpectNotes(group.Receive(kKey, 3).get(), kKey, 3, 2);
}

TEST(InboxesGroupsTest, WhoWaitsForAGroupGoesOnWhenItIsLost) {
  Group group(2, kNever, 2);
  group.SendAll(kKey, 0);
  EXPECT_FALSE(group.SendOnly(kKey, 2, 2).has_value());
  auto arrival = group.Receive(kKey, 0);
  group.transport().Lose(3, "it is gone", Inboxes::kForEver);
  ExpectNotes(arrival.get(), kKey, 0);
}

}  // namespace
}  // namespace jax_sm_free
