#include "cc/cpu/inboxes.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "cc/cpu/testing.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using ::testing::IsSubstring;
using testing::OnEveryRank;
using testing::Random;

constexpr Op kRecv = Op::kDispatchRecv;
constexpr double kNever = 600;  // a timeout that no test waits for
constexpr double kSoon = 0.05;
constexpr double kLater = 0.4;  // leaves a busy machine the time to do something before

// What a message of these tests says in its one row.
struct Note {
  ExchangeKey key;
  int32_t src = 0;
  int32_t dst = 0;

  bool operator==(const Note&) const = default;
};

constexpr MessageHeader kHeader{
    .kind = static_cast<int32_t>(Kind::kCombine), .num_rows = 1, .row_bytes = sizeof(Note)};

Exchange ExchangeOf(const ExchangeKey& key) { return {.sequence = 1, .key = key}; }

Fault FaultWith(const char* seen) {
  return {.op = "test", .rank = 0, .expected = "", .seen = seen, .exchange = {}};
}

// Groups, and what their transport called back. Ranks are members: those of the first group come
// first.
class Group {
 public:
  explicit Group(int32_t ep_size, double timeout_s = kNever, int32_t num_groups = 1)
      : ep_size_(ep_size),
        config_{.ep_size = ep_size, .num_experts = ep_size, .row_bytes = sizeof(Note)},
        transport_(std::make_shared<Inboxes>(
            ep_size, std::vector<int32_t>(num_groups, ep_size), timeout_s,
            [this](int64_t run, const Fault&) { failed_runs_.push_back(run); })) {}

  Message MessageOf(const ExchangeKey& key, int32_t src, int32_t dst) {
    const Note note{key, src, dst};
    Message message(pool_.Take(), config_, kHeader);
    std::memcpy(message.row(0), &note, sizeof(note));
    return message;
  }

  std::optional<Fault> Send(const ExchangeKey& key, int32_t src, int32_t dst) {
    return transport_->Send(key, src, dst, MessageOf(key, src, dst));
  }

  // Everything that `src` has to send.
  std::optional<Fault> SendToAll(const ExchangeKey& key, int32_t src) {
    const int32_t first = src / ep_size_ * ep_size_;
    return transport_->SendAll(key, src,
                               [&](int32_t rank) { return MessageOf(key, src, first + rank); });
  }

  // The only send of `src` in an exchange.
  std::optional<Fault> SendOnly(const ExchangeKey& key, int32_t src, int32_t dst) {
    std::optional<Fault> fault = Send(key, src, dst);
    transport_->Finish(key, src);
    return fault;
  }

  // The only sends of every rank of the group but `missing`: to `dst`.
  void SendAll(const ExchangeKey& key, int32_t dst, const std::vector<int32_t>& missing = {}) {
    const int32_t first = dst / ep_size_ * ep_size_;
    for (int32_t src = first; src < first + ep_size_; ++src) {
      if (std::find(missing.begin(), missing.end(), src) != missing.end()) continue;
      EXPECT_FALSE(SendOnly(key, src, dst).has_value());
    }
  }

  std::future<Inboxes::Arrival> Receive(const ExchangeKey& key, int32_t dst) {
    auto promise = std::make_shared<std::promise<Inboxes::Arrival>>();
    transport_->Receive(kRecv, ExchangeOf(key), dst, [promise](Inboxes::Arrival arrival) {
      promise->set_value(std::move(arrival));
    });
    return promise->get_future();
  }

  Inboxes& transport() { return *transport_; }
  int64_t num_blocks() const { return pool_.num_blocks(); }
  const std::vector<int64_t>& failed_runs() const { return failed_runs_; }

 private:
  const int32_t ep_size_;
  const Config config_;
  BlockPool pool_{MaxMessageBytes(config_)};
  std::vector<int64_t> failed_runs_;
  std::shared_ptr<Inboxes> transport_;
};

// Whether the arrival holds what every rank sent to `dst`, by source: members from `first` on.
void ExpectNotes(const Inboxes::Arrival& arrival, const ExchangeKey& key, int32_t dst,
                 int32_t first = 0) {
  ASSERT_EQ(FaultOf(arrival), nullptr) << FaultOf(arrival)->Describe();
  const auto& messages = std::get<std::vector<Message>>(arrival);
  for (int32_t src = 0; src < static_cast<int32_t>(messages.size()); ++src) {
    Note note;
    std::memcpy(&note, messages[src].row(0), sizeof(note));
    EXPECT_EQ(note, (Note{key, first + src, dst}));
  }
}

std::string SeenBy(const Inboxes::Arrival& arrival) {
  return FaultOf(arrival) == nullptr ? "no fault" : FaultOf(arrival)->seen;
}

bool IsReady(const std::future<Inboxes::Arrival>& future) {
  return future.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
}

constexpr ExchangeKey kKey{.run = 1, .call_site = 2, .count = 3};
constexpr ExchangeKey kSameRun{.run = 1, .call_site = 2, .count = 4};
constexpr ExchangeKey kOtherRun{.run = 2, .call_site = 2, .count = 3};

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

// ------------------------------------------------------------------------------ several groups

TEST(InboxesTest, ARankThatSendsAllAtOnceIsThroughWhenAllGroupsHaveSent) {
  Group group(2, kNever, 2);
  auto first = group.Receive(kKey, 0);
  auto second = group.Receive(kKey, 3);
  for (const int32_t src : {0, 1, 2}) EXPECT_FALSE(group.SendToAll(kKey, src).has_value());
  EXPECT_FALSE(IsReady(first));
  EXPECT_FALSE(group.SendToAll(kKey, 3).has_value());
  ExpectNotes(first.get(), kKey, 0);
  ExpectNotes(second.get(), kKey, 3, 2);
}

TEST(InboxesTest, ARankIsThroughWhenAllGroupsHaveSent) {
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

TEST(InboxesTest, AFaultInOneGroupEndsWhoWaitsForItInAnother) {
  Group group(2, kNever, 2);
  group.SendAll(kKey, 0);
  auto arrival = group.Receive(kKey, 0);
  group.transport().Fail(kKey.run, FaultWith("a failure"));
  EXPECT_EQ(SeenBy(arrival.get()), "a failure");
  EXPECT_EQ(SeenBy(group.Receive(kKey, 3).get()), "a failure");
  EXPECT_EQ(group.failed_runs(), std::vector<int64_t>{kKey.run});
}

TEST(InboxesTest, ATimeoutOfOneGroupIsTheFaultOfAll) {
  Group group(2, kSoon, 2);
  group.SendAll(kKey, 0);
  EXPECT_FALSE(group.SendOnly(kKey, 2, 2).has_value());
  auto through = group.Receive(kKey, 0);
  auto misses = group.Receive(kKey, 2);
  for (auto* arrival : {&through, &misses}) {
    EXPECT_EQ(SeenBy(arrival->get()), "1 after 0.05 s, none from rank 1");
  }
}

TEST(InboxesTest, AnExchangeThatAnotherGroupHasNotIsWaitedForOnce) {
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

TEST(InboxesTest, AGroupThatComesLateFindsItsMessages) {
  Group group(2, kNever, 2);
  group.SendAll(kKey, 0);
  ExpectNotes(group.Receive(kKey, 0).get(), kKey, 0);
  group.SendAll(kKey, 3);
  ExpectNotes(group.Receive(kKey, 3).get(), kKey, 3, 2);
}

TEST(InboxesTest, WhoWaitsForAGroupGoesOnWhenItIsLost) {
  Group group(2, kNever, 2);
  group.SendAll(kKey, 0);
  EXPECT_FALSE(group.SendOnly(kKey, 2, 2).has_value());
  auto arrival = group.Receive(kKey, 0);
  group.transport().Lose(3, "it is gone", Inboxes::kForEver);
  ExpectNotes(arrival.get(), kKey, 0);
}

// --------------------------------------------------------------------------------------- faults

TEST(InboxesTest, ATimeoutNamesTheMissingRanks) {
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

TEST(InboxesTest, ATimeoutEndsTheWholeRun) {
  Group group(2, kSoon);
  group.Receive(kKey, 0).wait();
  EXPECT_EQ(group.failed_runs(), std::vector<int64_t>{kKey.run});
  EXPECT_TRUE(group.Send(kSameRun, 0, 1).has_value());
}

TEST(InboxesTest, AReceiveInTimeDoesNotTimeOut) {
  Group group(2, kLater);
  auto arrival = group.Receive(kKey, 0);
  group.SendAll(kKey, 0);
  ExpectNotes(arrival.get(), kKey, 0);
  std::this_thread::sleep_for(std::chrono::duration<double>(kLater + kSoon));
  EXPECT_TRUE(group.failed_runs().empty());
}

TEST(InboxesTest, FailEndsAllThatWaitInTheRun) {
  Group group(2);
  auto first = group.Receive(kKey, 0);
  auto second = group.Receive(kKey, 1);
  auto third = group.Receive(kSameRun, 1);
  group.transport().Fail(kKey.run, FaultWith("a failure"));
  EXPECT_EQ(SeenBy(first.get()), "a failure");
  EXPECT_EQ(SeenBy(second.get()), "a failure");
  EXPECT_EQ(SeenBy(third.get()), "a failure");
}

TEST(InboxesTest, FailLeavesOtherRunsAlone) {
  Group group(2);
  auto other = group.Receive(kOtherRun, 0);
  group.transport().Fail(kKey.run, FaultWith("a failure"));
  EXPECT_FALSE(IsReady(other));
  group.SendAll(kOtherRun, 0);
  ExpectNotes(other.get(), kOtherRun, 0);
}

TEST(InboxesTest, ASecondFaultOfARunChangesNothing) {
  Group group(2);
  group.transport().Fail(kKey.run, FaultWith("first"));
  group.transport().Fail(kKey.run, FaultWith("second"));
  EXPECT_EQ(SeenBy(group.Receive(kKey, 0).get()), "first");
  EXPECT_EQ(group.failed_runs(), std::vector<int64_t>{kKey.run});
}

TEST(InboxesTest, OnFailIsCalledBeforeAnyReceiver) {
  Group group(2);
  std::promise<size_t> known;
  group.transport().Receive(kRecv, ExchangeOf(kKey), 0, [&](const Inboxes::Arrival&) {
    known.set_value(group.failed_runs().size());
  });
  group.transport().Fail(kKey.run, FaultWith("a failure"));
  EXPECT_EQ(known.get_future().get(), 1U);
}

TEST(InboxesTest, WhoComesLateToAFailedRunGetsItsFault) {
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

TEST(InboxesTest, AFailedRunGivesItsBlocksBack) {
  Group group(2);
  for (int64_t run = 0; run < 50; ++run) {
    group.SendAll({.run = run}, 0);
    group.transport().Fail(run, FaultWith("a failure"));
  }
  EXPECT_LE(group.num_blocks(), 2);
}

TEST(InboxesTest, CloseEndsAllThatWait) {
  Group group(2);
  auto first = group.Receive(kKey, 0);
  auto second = group.Receive(kOtherRun, 1);
  group.transport().Close(FaultWith("closed"));
  EXPECT_EQ(SeenBy(first.get()), "closed");
  EXPECT_EQ(SeenBy(second.get()), "closed");
}

TEST(InboxesTest, NothingWorksAfterClose) {
  Group group(2);
  group.transport().Close(FaultWith("closed"));
  EXPECT_TRUE(group.Send(kKey, 0, 1).has_value());
  EXPECT_EQ(SeenBy(group.Receive(kKey, 0).get()), "closed");
}

TEST(InboxesTest, CloseIsNoFailureOfARun) {
  Group group(2);
  auto arrival = group.Receive(kKey, 0);
  group.transport().Close(FaultWith("closed"));
  group.transport().Fail(kKey.run, FaultWith("a failure"));
  EXPECT_TRUE(group.failed_runs().empty());
}

TEST(InboxesTest, ATransportMayDieWhileATimerRuns) {
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

TEST(InboxesTest, RunsAfterAFailedOneWork) {
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
