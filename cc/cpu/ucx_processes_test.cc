#include "cc/cpu/ucx_processes.h"

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using std::chrono::duration;
using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;
using testing::Arrival;
using testing::Echoes;
using testing::EchoProcess;
using testing::Loss;
using testing::Node;
using testing::Note;

// Longer than it may take to notice that a peer has died, including link_timeout_s.
constexpr double kNoticed = 8.0;

double SecondsSince(Clock::time_point start) {
  return duration<double>(Clock::now() - start).count();
}

// Whether the next arrival is the echo of `number`.
bool ReceivesEcho(Node& node, int32_t peer, uint64_t number, int64_t bytes) {
  const std::optional<Arrival> arrival = node.Receive();
  return arrival && IsIntact(*arrival, {.src = peer, .dst = 0, .number = number, .bytes = bytes});
}

// With the transports that UCX chooses, and with each kind alone.
class UcxProcessesTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    SMF_NEED_UCX();
    if (*GetParam() != '\0') setenv("UCX_TLS", GetParam(), 1);
  }
  void TearDown() override { unsetenv("UCX_TLS"); }
};

INSTANTIATE_TEST_SUITE_P(Transports, UcxProcessesTest, ::testing::Values("", "tcp", "sm,self"),
                         [](const auto& info) {
                           const std::string name = info.param;
                           return name.empty() ? "Default" : name == "tcp" ? "Tcp" : "SharedMemory";
                         });

TEST_P(UcxProcessesTest, MessagesOfAllSizesGoThereAndBack) {
  Echoes echoes(2);
  const std::vector<int64_t> sizes{0, 1, 8192, 65536, 1 << 20, Node::kMaxPayloadBytes};
  for (size_t i = 0; i < sizes.size(); ++i) echoes.node.Send(1, i, sizes[i]);
  for (size_t i = 0; i < sizes.size(); ++i) {
    EXPECT_TRUE(ReceivesEcho(echoes.node, 1, i, sizes[i])) << sizes[i];
  }
  echoes.node.wire().Close();
  EXPECT_EQ(echoes.processes[1]->Finish(), 0);
}

TEST_P(UcxProcessesTest, ManyAtOnceInBothDirectionsKeepTheirOrder) {
  Echoes echoes(3);
  constexpr int kMessages = 400;
  const auto bytes = [](uint64_t i) { return static_cast<int64_t>(i % 7 == 0 ? 400000 : 37 * i); };
  for (int i = 0; i < kMessages; ++i) {
    for (const int32_t peer : {1, 2}) echoes.node.Send(peer, i, bytes(i));
  }
  std::vector<uint64_t> next(3);
  for (int i = 0; i < 2 * kMessages; ++i) {
    const std::optional<Arrival> arrival = echoes.node.Receive();
    ASSERT_TRUE(arrival);
    const int32_t peer = arrival->peer;
    const uint64_t number = next[peer]++;
    ASSERT_TRUE(
        IsIntact(*arrival, {.src = peer, .dst = 0, .number = number, .bytes = bytes(number)}));
  }
  for (const int32_t peer : {1, 2}) EXPECT_EQ(echoes.processes[peer]->Finish(), 0);
}

TEST_P(UcxProcessesTest, AKilledPeerIsReportedAndTheOthersGoOn) {
  Echoes echoes(3);
  for (const int32_t peer : {1, 2}) {
    echoes.node.Send(peer, 0, 1000);
    ASSERT_TRUE(ReceivesEcho(echoes.node, peer, 0, 1000));
  }
  const Clock::time_point start = Clock::now();
  echoes.processes[1]->Signal(SIGKILL);
  EXPECT_EQ(echoes.processes[1]->Finish(), -SIGKILL);
  const std::optional<Loss> loss = echoes.node.WaitForLoss();
  ASSERT_TRUE(loss);
  EXPECT_LT(SecondsSince(start), kNoticed);
  EXPECT_EQ(loss->peer, 1);
  EXPECT_FALSE(loss->reason.empty());
  std::printf("reported after %.2f s: %s\n", SecondsSince(start), loss->reason.c_str());

  echoes.node.Send(1, 1, 1 << 20);
  echoes.node.Send(2, 1, 1 << 20);
  EXPECT_TRUE(ReceivesEcho(echoes.node, 2, 1, 1 << 20));
  EXPECT_TRUE(echoes.node.WaitUntilSent());
  EXPECT_FALSE(echoes.node.WaitForLoss(milliseconds(100)));
  EXPECT_EQ(echoes.processes[2]->Finish(), 0);
}

TEST_P(UcxProcessesTest, AKilledPeerThatNobodyReapsIsReported) {
  Echoes echoes(2);
  echoes.node.Send(1, 0, 1000);
  ASSERT_TRUE(ReceivesEcho(echoes.node, 1, 0, 1000));
  const Clock::time_point start = Clock::now();
  echoes.processes[1]->Signal(SIGKILL);
  const std::optional<Loss> loss = echoes.node.WaitForLoss();
  ASSERT_TRUE(loss);
  EXPECT_LT(SecondsSince(start), kNoticed);
  EXPECT_EQ(echoes.processes[1]->Finish(), -SIGKILL);
}

// Over TCP the memory is freed at once. Over shared memory, UCX sometimes keeps what it was about
// to give to the dead process until the wire closes.
TEST_P(UcxProcessesTest, APeerKilledWithMessagesUnderWayFreesTheirMemory) {
  Echoes echoes(2);
  for (int i = 0; i < 8; ++i) echoes.node.Send(1, i, Node::kMaxPayloadBytes);
  ASSERT_TRUE(echoes.node.Receive());
  const Clock::time_point start = Clock::now();
  echoes.processes[1]->Signal(SIGKILL);
  echoes.processes[1]->Finish();
  const std::optional<Loss> loss = echoes.node.WaitForLoss();
  ASSERT_TRUE(loss);
  const bool freed = echoes.node.WaitUntilSent(duration<double>(kNoticed) - (Clock::now() - start));
  EXPECT_FALSE(echoes.node.WaitForLoss(milliseconds(100)));
  EXPECT_TRUE(freed || std::string_view(GetParam()) != "tcp");
  echoes.node.wire().Close();
  EXPECT_EQ(echoes.node.num_unsent(), 0);
}

TEST_P(UcxProcessesTest, CloseIsBoundedWhenAPeerIsDead) {
  Echoes echoes(2);
  for (int i = 0; i < 4; ++i) echoes.node.Send(1, i, Node::kMaxPayloadBytes);
  echoes.processes[1]->Signal(SIGKILL);
  const Clock::time_point start = Clock::now();
  echoes.node.wire().Close();
  EXPECT_LT(SecondsSince(start), kNoticed);
  EXPECT_EQ(echoes.node.num_unsent(), 0);
}

TEST_P(UcxProcessesTest, CloseIsBoundedWhenAPeerIsStopped) {
  Echoes echoes(2);
  echoes.processes[1]->Signal(SIGSTOP);
  for (int i = 0; i < 4; ++i) echoes.node.Send(1, i, Node::kMaxPayloadBytes);
  const Clock::time_point start = Clock::now();
  echoes.node.wire().Close();
  EXPECT_LT(SecondsSince(start), kNoticed);
  EXPECT_EQ(echoes.node.num_unsent(), 0);
}

TEST_P(UcxProcessesTest, APeerThatWasStoppedForAWhileIsNotLost) {
  Echoes echoes(2);
  echoes.node.Send(1, 0, 1000);
  ASSERT_TRUE(ReceivesEcho(echoes.node, 1, 0, 1000));
  echoes.processes[1]->Signal(SIGSTOP);
  for (int i = 1; i < 4; ++i) echoes.node.Send(1, i, Node::kMaxPayloadBytes);
  std::this_thread::sleep_for(milliseconds(2500));
  echoes.processes[1]->Signal(SIGCONT);
  for (int i = 1; i < 4; ++i) {
    EXPECT_TRUE(ReceivesEcho(echoes.node, 1, i, Node::kMaxPayloadBytes));
  }
  EXPECT_FALSE(echoes.node.WaitForLoss(milliseconds(0)));
  EXPECT_EQ(echoes.processes[1]->Finish(), 0);
}

double GigabytesPerSecond(int64_t bytes, Clock::time_point start) {
  return 1e-9 * static_cast<double>(bytes) / SecondsSince(start);
}

double CopySpeed(const std::vector<std::byte>& payload, int64_t num_messages) {
  std::vector<std::byte> copy(payload);
  const Clock::time_point start = Clock::now();
  for (int64_t i = 0; i < num_messages; ++i) {
    std::memcpy(copy.data(), payload.data(), payload.size());
    asm volatile("" ::"r"(copy.data()) : "memory");  // keeps the compiler from removing the copy
  }
  return GigabytesPerSecond(num_messages * static_cast<int64_t>(payload.size()), start);
}

// The speed of messages to process 1. At most 16 MiB of them, or two messages, are in flight.
double WireSpeed(Node& node, const std::vector<std::byte>& payload, int64_t num_messages) {
  const auto bytes = static_cast<int64_t>(payload.size());
  const Note note{.src = 0, .dst = 1, .number = EchoProcess::kMeasured, .bytes = bytes};
  const int64_t in_flight = std::max<int64_t>(2, (int64_t{1} << 24) / std::max<int64_t>(1, bytes));
  const Clock::time_point start = Clock::now();
  for (int64_t i = 0; i < num_messages + in_flight; ++i) {
    if (i >= in_flight && !node.Receive()) return 0.0;
    if (i < num_messages) {
      node.wire().Send(1, std::as_bytes(std::span(&note, 1)), payload, [] {});
    }
  }
  return GigabytesPerSecond(num_messages * bytes, start);
}

double RoundTripMicroseconds(Node& node) {
  constexpr int kRounds = 2000;
  const Clock::time_point start = Clock::now();
  for (int i = 0; i < kRounds; ++i) {
    node.Send(1, EchoProcess::kMeasured, 64);
    if (!node.Receive()) return 0.0;
  }
  return 1e6 * SecondsSince(start) / kRounds;
}

// Prints how much one process sends to another per second, and how fast a copy within this process
// is. Run it with --gtest_also_run_disabled_tests --gtest_filter='*Throughput*'
TEST_P(UcxProcessesTest, DISABLED_Throughput) {
  Echoes echoes(2);
  for (const int64_t bytes : {1 << 20, 1 << 23, 1 << 26}) {
    const std::vector<std::byte> payload(bytes, std::byte{1});
    const int64_t num_messages = (int64_t{1} << 31) / bytes;
    WireSpeed(echoes.node, payload,
              num_messages / 4);  // touches the pages and opens the connections
    std::printf("%2ld MiB: wire %.2f GB/s, memcpy %.2f GB/s\n", bytes >> 20,
                WireSpeed(echoes.node, payload, num_messages), CopySpeed(payload, num_messages));
  }
  std::printf("64 bytes there and back: %.1f us\n", RoundTripMicroseconds(echoes.node));
}

}  // namespace
}  // namespace jax_sm_free
