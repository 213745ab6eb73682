// How long receivers have waited, and for which ranks.

#include <chrono>
#include <cstdint>
#include <future>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "cc/cpu/inboxes.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

constexpr int32_t kRanks = 3;
constexpr double kNever = 600;
constexpr std::chrono::milliseconds kWhile(20);
constexpr int64_t kWhileNs = std::chrono::nanoseconds(kWhile).count();
constexpr ExchangeKey kKey{.run = 1, .call_site = 2, .count = 3};

// Two groups.
class InboxesWaitsTest : public ::testing::Test {
 protected:
  using Arrival = Inboxes::Arrival;

  std::shared_ptr<Inboxes> Open(double timeout_s = kNever) {
    return std::make_shared<Inboxes>(Config{.ep_size = kRanks, .timeout_s = timeout_s},
                                     std::vector<int32_t>{kRanks, kRanks},
                                     [](int64_t /*run*/, const Fault& /*fault*/) {});
  }

  void Send(Inboxes& transport, int32_t src, int32_t dst) {
    EXPECT_EQ(transport.Send(kKey, src, dst, Message()), std::nullopt);
  }

  std::future<Arrival> Receive(Inboxes& transport, int32_t dst) {
    auto promise = std::make_shared<std::promise<Arrival>>();
    transport.Receive(Op::kDispatchRecv, {.sequence = 1, .key = kKey}, dst,
                      [promise](Arrival arrival) { promise->set_value(std::move(arrival)); });
    return promise->get_future();
  }

  // All groups have finished their sends.
  void FinishAll(Inboxes& transport) {
    for (int32_t member = 0; member < 2 * kRanks; ++member) transport.Finish(kKey, member);
  }
};

TEST_F(InboxesWaitsTest, TheLastToComeHasTheMost) {
  const auto transport = Open();
  Send(*transport, 3, 4);
  std::future<Arrival> arrival = Receive(*transport, 4);
  std::this_thread::sleep_for(kWhile);
  Send(*transport, 4, 4);
  std::this_thread::sleep_for(kWhile);
  Send(*transport, 5, 4);
  // A wait for the other group, which is not counted for any rank.
  std::this_thread::sleep_for(kWhile);
  const std::vector<int64_t> waited = transport->WaitedNanoseconds(4);
  FinishAll(*transport);
  EXPECT_EQ(FaultOf(arrival.get()), nullptr);
  ASSERT_EQ(waited.size(), kRanks);
  EXPECT_EQ(waited[0], 0);
  EXPECT_GE(waited[1], kWhileNs);
  EXPECT_GE(waited[2], waited[1] + kWhileNs);
  EXPECT_EQ(transport->WaitedNanoseconds(4), waited);
}

TEST_F(InboxesWaitsTest, OthersHaveWaitedForNobody) {
  const auto transport = Open();
  std::future<Arrival> arrival = Receive(*transport, 4);
  std::this_thread::sleep_for(kWhile);
  for (const int32_t src : {3, 4, 5}) Send(*transport, src, 4);
  for (const int32_t member : {0, 1, 3, 5}) {
    EXPECT_EQ(transport->WaitedNanoseconds(member), std::vector<int64_t>(kRanks));
  }
  FinishAll(*transport);
  EXPECT_EQ(FaultOf(arrival.get()), nullptr);
}

TEST_F(InboxesWaitsTest, WhatIsThereIsNotWaitedFor) {
  const auto transport = Open();
  for (const int32_t src : {0, 1, 2}) Send(*transport, src, 1);
  FinishAll(*transport);
  std::this_thread::sleep_for(kWhile);
  EXPECT_EQ(FaultOf(Receive(*transport, 1).get()), nullptr);
  EXPECT_EQ(transport->WaitedNanoseconds(1), std::vector<int64_t>(kRanks));
}

TEST_F(InboxesWaitsTest, AWaitInVainCounts) {
  constexpr double kSoon = 0.05;
  const auto transport = Open(kSoon);
  Send(*transport, 0, 1);
  EXPECT_NE(FaultOf(Receive(*transport, 1).get()), nullptr);
  const std::vector<int64_t> waited = transport->WaitedNanoseconds(1);
  EXPECT_EQ(waited[0], 0);
  for (const int32_t source : {1, 2}) {
    EXPECT_GE(waited[source], static_cast<int64_t>(kSoon * 1e9) * 9 / 10);
  }
}

TEST_F(InboxesWaitsTest, WaitsAddUp) {
  const auto transport = Open();
  for (int64_t count = 0; count < 3; ++count) {
    std::future<Arrival> arrival = Receive(*transport, 2);
    for (const int32_t src : {1, 2}) Send(*transport, src, 2);
    std::this_thread::sleep_for(kWhile);
    Send(*transport, 0, 2);
    FinishAll(*transport);
    EXPECT_EQ(FaultOf(arrival.get()), nullptr);
    // The other ranks end the round, too, so that its name can be used again.
    for (const int32_t dst : {0, 1}) {
      for (const int32_t src : {0, 1, 2}) Send(*transport, src, dst);
      EXPECT_EQ(FaultOf(Receive(*transport, dst).get()), nullptr);
    }
  }
  EXPECT_GE(transport->WaitedNanoseconds(2)[0], 3 * kWhileNs);
}

}  // namespace
}  // namespace jax_sm_free
