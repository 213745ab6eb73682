// Timeouts, failures and closing, and whom they reach.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <optional>
#include <thread>
#include <vector>

#include "cc/cpu/inboxes.h"
#include "cc/cpu/inboxes_testing.h"
#include "cc/cpu/testing.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using testing::ExchangeOf;
using testing::ExpectNotes;
using testing::FaultWith;
using testing::Group;
using testing::IsReady;
using testing::kKey;
using testing::kLater;
using testing::kOtherRun;
using testing::kRecv;
using testing::kSameRun;
using testing::kSoon;
using testing::OnEveryRank;
using testing::SeenBy;

TEST(InboxesFaultsTest, ATimeoutNamesTheMissingRanks) {
  Group group(4, kSoon);
  group.SendAll(kKey, 2, {1, 3});
  const Inboxes::Arrival result = group.Receive(kKey, 2).get();
  ASSERT_NE(FaultOf(result), nullptr);
  const Fault& fault = *FaultOf(result);
  EXPECT_EQ(fault.op, "dispatch_recv");
  EXPECT_EQ(fault.rank, 2);
  EXPECT_EQ(fault.peer, 1);
  EXPECT_EQ(fault.expected, "messages from 4 ranks within 0.05 s");
  EXPECT_EQ(fault.seen, "2 after 0.05 s, none from rank 1, 3");
  EXPECT_EQ(fault.exchange, "dispatch exchange 1, slot 0");
}

TEST(InboxesFaultsTest, ATimeoutEndsTheWholeRun) {
  Group group(2, kSoon);
  group.Receive(kKey, 0).wait();
  EXPECT_EQ(group.failed_runs(), std::vector<int64_t>{kKey.run});
  EXPECT_TRUE(group.Send(kSameRun, 0, 1).has_value());
}

TEST(InboxesFaultsTest, AReceiveInTimeDoesNotTimeOut) {
  Group group(2, kLater);
  group.SendAll(kKey, 0, {1});
  auto arrival = group.Receive(kKey, 0);
  EXPECT_FALSE(group.SendOnly(kKey, 1, 0).has_value());
  ExpectNotes(arrival.get(), kKey, 0);
  std::this_thread::sleep_for(std::chrono::duration<double>(kLater + kSoon));
  EXPECT_TRUE(group.failed_runs().empty());
}

TEST(InboxesFaultsTest, FailEndsAllThatWaitInTheRun) {
  Group group(2);
  auto first = group.Receive(kKey, 0);
  auto second = group.Receive(kKey, 1);
  auto third = group.Receive(kSameRun, 1);
  group.transport().Fail(kKey.run, FaultWith("a failure"));
  EXPECT_EQ(SeenBy(first.get()), "a failure");
  EXPECT_EQ(SeenBy(second.get()), "a failure");
  EXPECT_EQ(SeenBy(third.get()), "a failure");
}

TEST(InboxesFaultsTest, FailLeavesOtherRunsAlone) {
  Group group(2);
  auto other = group.Receive(kOtherRun, 0);
  group.transport().Fail(kKey.run, FaultWith("a failure"));
  EXPECT_FALSE(IsReady(other));
  group.SendAll(kOtherRun, 0);
  ExpectNotes(other.get(), kOtherRun, 0);
}

TEST(InboxesFaultsTest, ASecondFaultOfARunChangesNothing) {
  Group group(2);
  group.transport().Fail(kKey.run, FaultWith("first"));
  group.transport().Fail(kKey.run, FaultWith("second"));
  EXPECT_EQ(SeenBy(group.Receive(kKey, 0).get()), "first");
  EXPECT_EQ(group.failed_runs(), std::vector<int64_t>{kKey.run});
}

TEST(InboxesFaultsTest, OnFailIsCalledBeforeAnyReceiver) {
  Group group(2);
  std::promise<size_t> known;
  group.transport().Receive(kRecv, ExchangeOf(kKey), 0, [&](const Inboxes::Arrival&) {
    known.set_value(group.failed_runs().size());
  });
  group.transport().Fail(kKey.run, FaultWith("a failure"));
  EXPECT_EQ(known.get_future().get(), 1U);
}

TEST(InboxesFaultsTest, WhoComesLateToAFailedRunGetsItsFault) {
  Group group(2);
  group.transport().Fail(kKey.run, FaultWith("a failure"));
  const std::optional<Fault> late_sender = group.Send(kKey, 0, 1);
  ASSERT_TRUE(late_sender.has_value());
  EXPECT_EQ(late_sender->seen, "a failure");
  const std::optional<Fault> late_sender_of_all = group.SendToAll(kKey, 0);
  ASSERT_TRUE(late_sender_of_all.has_value());
  EXPECT_EQ(late_sender_of_all->seen, "a failure");
  EXPECT_EQ(SeenBy(group.Receive(kSameRun, 1).get()), "a failure");
}

TEST(InboxesFaultsTest, AFailedRunGivesItsBlocksBack) {
  Group group(2);
  for (int64_t run = 0; run < 50; ++run) {
    group.SendAll({.run = run}, 0);
    group.transport().Fail(run, FaultWith("a failure"));
  }
  EXPECT_LE(group.num_blocks(), 2);
}

TEST(InboxesFaultsTest, CloseEndsAllThatWait) {
  Group group(2);
  auto first = group.Receive(kKey, 0);
  auto second = group.Receive(kOtherRun, 1);
  group.transport().Close(FaultWith("closed"));
  EXPECT_EQ(SeenBy(first.get()), "closed");
  EXPECT_EQ(SeenBy(second.get()), "closed");
}

TEST(InboxesFaultsTest, NothingWorksAfterClose) {
  Group group(2);
  group.transport().Close(FaultWith("closed"));
  EXPECT_TRUE(group.Send(kKey, 0, 1).has_value());
  EXPECT_EQ(SeenBy(group.Receive(kKey, 0).get()), "closed");
}

TEST(InboxesFaultsTest, CloseIsNoFailureOfARun) {
  Group group(2);
  auto arrival = group.Receive(kKey, 0);
  group.transport().Close(FaultWith("closed"));
  group.transport().Fail(kKey.run, FaultWith("a failure"));
  EXPECT_TRUE(group.failed_runs().empty());
}

TEST(InboxesFaultsTest, ATransportMayDieWhileATimerRuns) {
  std::future<Inboxes::Arrival> arrival;
  {
    Group group(2, kLater);
    arrival = group.Receive(kKey, 0);
  }
  std::this_thread::sleep_for(std::chrono::duration<double>(kLater + kSoon));
  EXPECT_THROW(arrival.get(), std::future_error);  // nobody was called
}

// Ranks exchange while one of them fails the run: each gets its messages or the fault, and the
// next run works.
void ExchangeWithAFailure(Group& group, int32_t ep_size, int32_t rank, int64_t run) {
  const ExchangeKey key{.run = run};
  if (rank == run % ep_size) group.transport().Fail(run, FaultWith("a failure"));
  for (int32_t dst = 0; dst < ep_size; ++dst) group.Send(key, rank, dst);
  EXPECT_EQ(SeenBy(group.Receive(key, rank).get()), "a failure");
}

TEST(InboxesFaultsTest, RunsAfterAFailedOneWork) {
  constexpr int32_t kEpSize = 4;
  Group group(kEpSize);
  OnEveryRank(kEpSize, [&](int32_t rank) {
    for (int64_t run = 0; run < 100; run += 2) {
      ExchangeWithAFailure(group, kEpSize, rank, run);
      const ExchangeKey key{.run = run + 1};
      for (int32_t dst = 0; dst < kEpSize; ++dst) {
        EXPECT_FALSE(group.Send(key, rank, dst).has_value());
      }
      group.transport().Finish(key, rank);
      ExpectNotes(group.Receive(key, rank).get(), key, rank);
    }
  });
  EXPECT_EQ(group.failed_runs().size(), 50U);
}

}  // namespace
}  // namespace jax_sm_free
