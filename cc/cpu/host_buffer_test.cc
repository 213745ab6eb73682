#include "cc/cpu/host_buffer.h"

#include <chrono>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using ::testing::IsSubstring;

constexpr int64_t kId = 5;
constexpr Op kSend = Op::kDispatchSend;
constexpr Op kRecv = Op::kDispatchRecv;
constexpr Config kConfig{
    .ep_size = 2, .num_experts = 4, .top_k = 2, .max_tokens = 3, .row_bytes = 8};

// Device 0 is in no group. Devices 1 to 4 are two groups of two ranks, in mixed order.
std::shared_ptr<HostBuffer> TwoGroups() {
  return std::make_shared<HostBuffer>(
      kId, kConfig,
      std::vector<std::optional<Place>>{std::nullopt, Place{.group = 1, .rank = 1, .position = 3},
                                        Place{.group = 0, .rank = 0, .position = 0},
                                        Place{.group = 0, .rank = 1, .position = 1},
                                        Place{.group = 1, .rank = 0, .position = 2}});
}

// What a recv of rank `device` ends with. It waits for messages that no rank sends.
std::future<std::string> FaultOfReceive(const HostBuffer& buffer, int32_t device, int64_t run) {
  auto promise = std::make_shared<std::promise<std::string>>();
  const HostRank& rank = *buffer.RankOf(device);
  rank.transport->Receive(kRecv, {.sequence = 1, .key = {.run = run}}, rank.member,
                          [promise](const Transport::Arrival& arrival) {
                            const Fault* fault = FaultOf(arrival);
                            promise->set_value(fault == nullptr ? "" : fault->seen);
                          });
  return promise->get_future();
}

Fault FaultWith(const char* seen) {
  return {.op = "test", .rank = 0, .expected = "", .seen = seen, .exchange = {}};
}

TEST(HostBufferTest, FindsTheRankOfADevice) {
  const auto buffer = TwoGroups();
  ASSERT_NE(buffer->RankOf(1), nullptr);
  EXPECT_EQ(buffer->RankOf(1)->rank, 1);
  EXPECT_EQ(buffer->RankOf(1)->member, 3);
  EXPECT_EQ(buffer->RankOf(1)->position, 3);
  EXPECT_EQ(buffer->RankOf(4)->rank, 0);
  EXPECT_EQ(buffer->RankOf(4)->position, 2);
}

TEST(HostBufferTest, DevicesOutsideTheMeshHaveNoRank) {
  const auto buffer = TwoGroups();
  EXPECT_EQ(buffer->RankOf(0), nullptr);
  EXPECT_EQ(buffer->RankOf(5), nullptr);
  EXPECT_EQ(buffer->RankOf(-1), nullptr);
}

TEST(HostBufferTest, CountsTheBytesOfBlocksTaken) {
  const auto buffer = TwoGroups();
  EXPECT_EQ(buffer->MessageBytes(2), 0);
  const BlockPool::Block first = buffer->RankOf(2)->pool.Take();
  const BlockPool::Block second = buffer->RankOf(2)->pool.Take();
  EXPECT_EQ(buffer->MessageBytes(2), 2 * MaxMessageBytes(kConfig));
  EXPECT_EQ(buffer->MessageBytes(3), 0);
  EXPECT_EQ(buffer->MessageBytes(0), 0);
}

TEST(HostBufferTest, KeepsTheFaultOfAFailedRun) {
  const auto buffer = TwoGroups();
  buffer->RankOf(2)->transport->Fail(1, FaultWith("a failure"));
  EXPECT_PRED_FORMAT2(IsSubstring, "a failure", buffer->TakeFault().value_or(""));
}

TEST(HostBufferTest, AFailedRunMayBeForgottenByEveryRank) {
  const auto buffer = TwoGroups();
  for (int64_t run = 0; run < 200; ++run) {  // many more than a ledger keeps
    for (const int32_t device : {3, 4}) {
      ASSERT_EQ(FaultOf(buffer->RankOf(device)->ledger.Begin(kSend, run, 0)), nullptr);
    }
    buffer->RankOf(2)->transport->Fail(run, FaultWith("a failure"));
  }
}

TEST(HostBufferTest, AFailureEndsItsRunInEveryGroup) {
  const auto buffer = TwoGroups();
  auto same_group = FaultOfReceive(*buffer, 3, 1);
  auto other_group = FaultOfReceive(*buffer, 4, 1);
  auto other_run = FaultOfReceive(*buffer, 4, 2);
  buffer->RankOf(2)->transport->Fail(1, FaultWith("a failure"));
  EXPECT_EQ(same_group.get(), "a failure");
  EXPECT_EQ(other_group.get(), "a failure");
  EXPECT_EQ(other_run.wait_for(std::chrono::seconds(0)), std::future_status::timeout);
  buffer->Close();
  EXPECT_EQ(other_run.get(), "it was closed");
}

TEST(HostBufferTest, TellsTheFaultOfARunOnStderrOnce) {
  const auto buffer = TwoGroups();
  ::testing::internal::CaptureStderr();
  buffer->RankOf(2)->transport->Fail(1, FaultWith("a failure"));
  buffer->RankOf(4)->transport->Fail(1, FaultWith("what follows from it"));
  EXPECT_EQ(::testing::internal::GetCapturedStderr(),
            "jax_sm_free: test on rank 0: expected , seen a failure\n");
}

TEST(HostBufferTest, TellsTheSameFaultOfManyRunsOnce) {
  const auto buffer = TwoGroups();
  ::testing::internal::CaptureStderr();
  for (int64_t run = 0; run < 10; ++run) {
    buffer->RankOf(2)->transport->Fail(run, FaultWith("a failure"));
  }
  buffer->RankOf(2)->transport->Fail(10, FaultWith("another"));
  EXPECT_EQ(::testing::internal::GetCapturedStderr(),
            "jax_sm_free: test on rank 0: expected , seen a failure\n"
            "jax_sm_free: test on rank 0: expected , seen another\n");
}

TEST(HostBufferTest, ClosingTellsNothing) {
  const auto buffer = TwoGroups();
  auto waiting = FaultOfReceive(*buffer, 2, 1);
  ::testing::internal::CaptureStderr();
  buffer->Close();
  waiting.wait();
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "");
}

TEST(HostBufferTest, CloseEndsWhatWaitsInEveryGroup) {
  const auto buffer = TwoGroups();
  auto first = FaultOfReceive(*buffer, 2, 1);
  auto second = FaultOfReceive(*buffer, 1, 2);
  buffer->Close();
  EXPECT_EQ(first.get(), "it was closed");
  EXPECT_EQ(second.get(), "it was closed");
}

TEST(HostBufferTest, CloseIsNoFaultOfTheBuffer) {
  const auto buffer = TwoGroups();
  auto waiting = FaultOfReceive(*buffer, 2, 1);
  buffer->Close();
  waiting.wait();
  EXPECT_FALSE(buffer->TakeFault().has_value());
}

TEST(HostBufferTest, DestructionEndsWhatWaits) {
  auto buffer = TwoGroups();
  auto waiting = FaultOfReceive(*buffer, 2, 1);
  buffer.reset();
  EXPECT_EQ(waiting.get(), "it was closed");
}

TEST(HostBufferTest, ATransportThatOutlivesItsBufferDoesNotCallIt) {
  auto buffer = TwoGroups();
  const std::shared_ptr<Transport> transport = buffer->RankOf(2)->transport;
  buffer.reset();
  transport->Fail(1, FaultWith("a failure"));
}

}  // namespace
}  // namespace jax_sm_free
