// The rounds of two tiers: which messages come, and the ranks that carry them.

#include <chrono>
#include <cstdint>
#include <future>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "cc/cpu/hop.h"
#include "cc/cpu/inboxes.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using ::testing::IsSubstring;

constexpr double kNever = 600;
constexpr double kSoon = 0.05;
constexpr std::chrono::milliseconds kWhile(20);

// Ranks 0 and 1 are node 0, and ranks 2 and 3 are node 1.
constexpr int32_t kRanks = 4;

class InboxesTiersTest : public ::testing::Test {
 protected:
  using Arrival = Inboxes::Arrival;

  void Open(double timeout_s = kNever) {
    config_ = {.ep_size = kRanks, .timeout_s = timeout_s, .num_nodes = 2, .node_stride = 2};
    transport_ = std::make_shared<Inboxes>(config_, std::vector<int32_t>{kRanks},
                                           [](int64_t /*run*/, const Fault& /*fault*/) {});
  }

  static ExchangeKey KeyOf(Hop hop) { return {.run = 1, .call_site = 2, .count = 3, .hop = hop}; }

  std::optional<Fault> Send(Hop hop, int32_t number, int32_t dst) {
    return transport_->Send(KeyOf(hop), number, dst, Message());
  }

  std::future<Arrival> Receive(Hop hop, int32_t dst) {
    auto promise = std::make_shared<std::promise<Arrival>>();
    transport_->Receive(Op::kDispatchRecv, {.sequence = 1, .key = KeyOf(hop)}, dst,
                        [promise](Arrival arrival) { promise->set_value(std::move(arrival)); });
    return promise->get_future();
  }

  static bool IsReady(const std::future<Arrival>& future) {
    return future.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
  }

  Config config_;
  std::shared_ptr<Inboxes> transport_;
};

TEST_F(InboxesTiersTest, ARoundIsCompleteWhenAllThatComesHasCome) {
  const std::vector<std::pair<Hop, std::vector<int32_t>>> numbers_for_rank_1 = {
      {Hop::kRail, {3}},
      {Hop::kSpread, {0, 1, 2, 3}},
      {Hop::kGather, {2, 3}},
      {Hop::kHome, {0, 1, 3}}};
  Open();
  for (const auto& [hop, numbers] : numbers_for_rank_1) {
    std::future<Arrival> arrival = Receive(hop, 1);
    for (const int32_t number : numbers) {
      EXPECT_FALSE(IsReady(arrival)) << "hop " << static_cast<int32_t>(hop);
      EXPECT_EQ(Send(hop, number, 1), std::nullopt);
    }
    EXPECT_EQ(FaultOf(arrival.get()), nullptr);
  }
}

TEST_F(InboxesTiersTest, ATimeoutNamesTheRankThatCarries) {
  Open(kSoon);
  for (const int32_t number : {0, 1, 2}) EXPECT_EQ(Send(Hop::kSpread, number, 0), std::nullopt);
  const Arrival arrival = Receive(Hop::kSpread, 0).get();
  ASSERT_NE(FaultOf(arrival), nullptr);
  // Rank 1 forwards what rank 3 has sent.
  EXPECT_PRED_FORMAT2(IsSubstring,
                      "dispatch_recv on rank 0 of node 0, peer rank 1 of node 0: expected "
                      "messages from 2 ranks within 0.05 s, seen 1",
                      FaultOf(arrival)->Describe());
}

TEST_F(InboxesTiersTest, ARankThatCarriesIsNamedOnce) {
  Open(kSoon);
  const Arrival arrival = Receive(Hop::kSpread, 0).get();
  ASSERT_NE(FaultOf(arrival), nullptr);
  EXPECT_EQ(FaultOf(arrival)->seen, "0 after 0.55 s, none from rank 0, 1");
}

TEST_F(InboxesTiersTest, ASecondMessageOfOneNumberNamesTheRankThatCarries) {
  Open();
  EXPECT_EQ(Send(Hop::kSpread, 3, 0), std::nullopt);
  const std::optional<Fault> fault = Send(Hop::kSpread, 3, 0);
  ASSERT_TRUE(fault.has_value());
  EXPECT_EQ(fault->peer, 1);
}

TEST_F(InboxesTiersTest, AWaitIsCountedOnceForTheRankThatCarries) {
  Open();
  std::future<Arrival> arrival = Receive(Hop::kSpread, 0);
  EXPECT_EQ(Send(Hop::kSpread, 1, 0), std::nullopt);
  std::this_thread::sleep_for(kWhile);
  EXPECT_EQ(transport_->WaitedNanoseconds(0), std::vector<int64_t>(kRanks));
  EXPECT_EQ(Send(Hop::kSpread, 3, 0), std::nullopt);
  const std::vector<int64_t> waited = transport_->WaitedNanoseconds(0);
  EXPECT_GE(waited[1], std::chrono::nanoseconds(kWhile).count());
  EXPECT_EQ(waited, (std::vector<int64_t>{0, waited[1], 0, 0}));
  for (const int32_t number : {0, 2}) EXPECT_EQ(Send(Hop::kSpread, number, 0), std::nullopt);
  EXPECT_EQ(FaultOf(arrival.get()), nullptr);
}

TEST_F(InboxesTiersTest, ALostRankEndsThoseToWhomItCarries) {
  Open();
  std::future<Arrival> spread = Receive(Hop::kSpread, 0);
  transport_->Lose(3, "it was cut", Inboxes::kForEver);
  EXPECT_FALSE(IsReady(spread));
  transport_->Lose(1, "it was cut", Inboxes::kForEver);
  const Arrival arrival = spread.get();
  ASSERT_NE(FaultOf(arrival), nullptr);
  EXPECT_PRED_FORMAT2(IsSubstring, "peer rank 1 of node 0: expected a message from rank 1",
                      FaultOf(arrival)->Describe());
}

}  // namespace
}  // namespace jax_sm_free
