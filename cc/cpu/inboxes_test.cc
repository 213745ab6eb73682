#include "cc/cpu/inboxes.h"

#include <cstdint>
#include <future>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "cc/cpu/inboxes_testing.h"
#include "cc/cpu/testing.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using testing::ExchangeOf;
using testing::ExpectNotes;
using testing::Group;
using testing::IsReady;
using testing::kKey;
using testing::kOtherRun;
using testing::kRecv;
using testing::kSameRun;
using testing::OnEveryRank;
using testing::Random;

TEST(InboxesTest, HandsOverMessagesBySource) {
  Group group(3);
  for (const int32_t src : {2, 0, 1}) EXPECT_FALSE(group.SendOnly(kKey, src, 1).has_value());
  ExpectNotes(group.Receive(kKey, 1).get(), kKey, 1);
}

TEST(InboxesTest, CompletesOnTheCallingThreadIfAllIsThere) {
  Group group(2);
  group.SendAll(kKey, 0);
  std::thread::id thread;
  group.transport().Receive(kRecv, ExchangeOf(kKey), 0,
                            [&](const Inboxes::Arrival&) { thread = std::this_thread::get_id(); });
  EXPECT_EQ(thread, std::this_thread::get_id());
}

TEST(InboxesTest, CompletesOnAWorkerThreadIfSomethingIsMissing) {
  Group group(2);
  EXPECT_FALSE(group.SendOnly(kKey, 0, 0).has_value());
  std::promise<std::thread::id> thread;
  group.transport().Receive(kRecv, ExchangeOf(kKey), 0, [&](const Inboxes::Arrival&) {
    thread.set_value(std::this_thread::get_id());
  });
  EXPECT_FALSE(group.SendOnly(kKey, 1, 0).has_value());
  EXPECT_NE(thread.get_future().get(), std::this_thread::get_id());
}

TEST(InboxesTest, IsNotCompleteBeforeTheLastMessage) {
  Group group(3);
  auto arrival = group.Receive(kKey, 0);
  group.SendAll(kKey, 0, {1});
  group.SendAll(kSameRun, 0);
  group.SendAll(kOtherRun, 0);
  EXPECT_FALSE(IsReady(arrival));
  EXPECT_FALSE(group.SendOnly(kKey, 1, 0).has_value());
  ExpectNotes(arrival.get(), kKey, 0);
}

TEST(InboxesTest, AGroupOfOneRankSendsToItself) {
  Group group(1);
  group.SendAll(kKey, 0);
  ExpectNotes(group.Receive(kKey, 0).get(), kKey, 0);
}

TEST(InboxesTest, GivesTheBlocksBack) {
  Group group(2);
  for (int64_t run = 0; run < 50; ++run) {
    const ExchangeKey key{.run = run};
    group.SendAll(key, 0);
    ExpectNotes(group.Receive(key, 0).get(), key, 0);
  }
  EXPECT_LE(group.num_blocks(), 2);
}

// Every rank sends and receives many exchanges, each in an order of its own.
void ExchangeInRandomOrder(Group& group, int32_t ep_size, int32_t rank) {
  constexpr int64_t kNumExchanges = 40;
  Random random(rank);
  const auto shuffled_keys = [&](int64_t round) {
    std::vector<ExchangeKey> keys;
    for (int64_t i = 0; i < kNumExchanges; ++i) {
      keys.push_back({.run = round, .call_site = i % 3, .count = i / 3});
      std::swap(keys.back(), keys[random.Below(i + 1)]);
    }
    return keys;
  };
  for (int64_t round = 0; round < 5; ++round) {
    for (const ExchangeKey& key : shuffled_keys(round)) {
      for (int32_t i = 0; i < ep_size; ++i) {
        EXPECT_FALSE(group.Send(key, rank, (rank + i) % ep_size).has_value());
      }
      group.transport().Finish(key, rank);
    }
    std::vector<std::pair<ExchangeKey, std::future<Inboxes::Arrival>>> arrivals;
    for (const ExchangeKey& key : shuffled_keys(round)) {
      arrivals.emplace_back(key, group.Receive(key, rank));
    }
    for (auto& [key, arrival] : arrivals) ExpectNotes(arrival.get(), key, rank);
  }
}

TEST(InboxesTest, EightRanksWithManyExchangesInFlightInRandomOrder) {
  constexpr int32_t kEpSize = 8;
  Group group(kEpSize);
  OnEveryRank(kEpSize, [&](int32_t rank) { ExchangeInRandomOrder(group, kEpSize, rank); });
}

TEST(InboxesTest, NoRankIsThroughBeforeAllHaveSentAll) {
  Group group(2);
  auto arrival = group.Receive(kKey, 0);
  EXPECT_FALSE(group.Send(kKey, 0, 0).has_value());
  EXPECT_FALSE(group.Send(kKey, 1, 0).has_value());  // to rank 1 it has not sent yet
  group.transport().Finish(kKey, 0);
  EXPECT_FALSE(IsReady(arrival));
  group.transport().Finish(kKey, 1);
  ExpectNotes(arrival.get(), kKey, 0);
}

TEST(InboxesTest, WhoSendsAllAtOnceIsFinished) {
  Group group(3);
  auto early = group.Receive(kKey, 0);
  for (const int32_t src : {2, 0}) EXPECT_FALSE(group.SendToAll(kKey, src).has_value());
  EXPECT_FALSE(IsReady(early));
  EXPECT_FALSE(group.SendToAll(kKey, 1).has_value());
  ExpectNotes(early.get(), kKey, 0);
  for (const int32_t dst : {1, 2}) ExpectNotes(group.Receive(kKey, dst).get(), kKey, dst);
}

TEST(InboxesTest, SendingAllTwiceIsAFaultThatLeavesTheOthersTheirs) {
  Group group(2);
  EXPECT_FALSE(group.SendToAll(kKey, 0).has_value());
  const std::optional<Fault> fault = group.SendToAll(kKey, 0);
  ASSERT_TRUE(fault.has_value());
  EXPECT_FALSE(group.SendToAll(kKey, 1).has_value());
  ExpectNotes(group.Receive(kKey, 1).get(), kKey, 1);
}

}  // namespace
}  // namespace jax_sm_free
