#include "cc/cpu/ucx_wire.h"

#include <sys/resource.h>

#include <chrono>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "cc/cpu/ucx_testing.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using std::chrono::milliseconds;
using testing::Arrival;
using ::testing::IsSubstring;
using testing::Loss;
using testing::Node;
using testing::Note;
using testing::UcxLibraryPath;

using Nodes = std::vector<std::unique_ptr<Node>>;

Nodes MakeNodes(int32_t num_nodes) {
  Nodes nodes;
  for (int32_t i = 0; i < num_nodes; ++i) nodes.push_back(std::make_unique<Node>(i, num_nodes));
  return nodes;
}

std::vector<std::string> AddressesOf(const Nodes& nodes) {
  std::vector<std::string> addresses;
  for (const auto& node : nodes) addresses.push_back(node->wire().address());
  return addresses;
}

Nodes ConnectedNodes(int32_t num_nodes) {
  Nodes nodes = MakeNodes(num_nodes);
  for (const auto& node : nodes) node->wire().Connect(AddressesOf(nodes));
  return nodes;
}

TEST(UcxLibraryTest, NamesTheLibraryThatIsNotThere) {
  const auto library = UcxLibrary::Load("/nowhere/libucp.so.0");
  const Fault* fault = FaultOf(library);
  ASSERT_NE(fault, nullptr);
  EXPECT_PRED_FORMAT2(IsSubstring, "expected the library /nowhere/libucp.so.0, seen ",
                      fault->Describe());
  EXPECT_PRED_FORMAT2(IsSubstring, "No such file", fault->Describe());
}

TEST(UcxLibraryTest, NamesTheFunctionThatALibraryLacks) {
  const auto library = UcxLibrary::Load("libc.so.6");
  const Fault* fault = FaultOf(library);
  ASSERT_NE(fault, nullptr);
  EXPECT_PRED_FORMAT2(IsSubstring, "undefined symbol: ucp_", fault->Describe());
}

TEST(UcxWireOpenTest, AFaultNamesTheProcess) {
  const auto wire = UcxWire::Open({.library = "/nowhere", .self = 3, .num_peers = 4}, {});
  const Fault* fault = FaultOf(wire);
  ASSERT_NE(fault, nullptr);
  EXPECT_EQ(fault->rank, 3);
}

// With the transports that UCX chooses, and with each kind alone.
class UcxWireTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    SMF_NEED_UCX();
    if (*GetParam() != '\0') setenv("UCX_TLS", GetParam(), 1);
  }
  void TearDown() override { unsetenv("UCX_TLS"); }
};

INSTANTIATE_TEST_SUITE_P(Transports, UcxWireTest, ::testing::Values("", "tcp", "sm,self"),
                         [](const auto& info) {
                           const std::string name = info.param;
                           return name.empty() ? "Default" : name == "tcp" ? "Tcp" : "SharedMemory";
                         });

TEST_P(UcxWireTest, MessagesOfAllSizesArriveWhole) {
  const Nodes nodes = ConnectedNodes(2);
  std::vector<Note> notes;
  for (const int64_t bytes : {0L, 1L, 63L, 8192L, 65536L, 1L << 20, (1L << 22) + 1, 1L << 26}) {
    notes.push_back(nodes[0]->Send(1, notes.size(), bytes));
  }
  for (const Note& note : notes) {
    const std::optional<Arrival> arrival = nodes[1]->Receive();
    ASSERT_TRUE(arrival);
    EXPECT_TRUE(IsIntact(*arrival, note)) << note.bytes;
  }
  EXPECT_TRUE(nodes[0]->WaitUntilSent());
}

// Sizes for all protocols of UCX, mixed, so that small messages may overtake large ones.
int64_t MixedBytes(int i) { return i % 5 == 0 ? 300000 + i : i % 3 == 0 ? 20000 + i : i; }

TEST_P(UcxWireTest, MessagesOfAPeerKeepTheirOrder) {
  const Nodes nodes = ConnectedNodes(3);
  constexpr int kMessages = 300;
  for (int i = 0; i < kMessages; ++i) {
    for (const auto& node : nodes) {
      const auto self = static_cast<int32_t>(&node - nodes.data());
      for (int32_t peer = 0; peer < 3; ++peer) {
        if (peer != self) node->Send(peer, i, MixedBytes(i));
      }
    }
  }
  for (int32_t self = 0; self < 3; ++self) {
    std::vector<uint64_t> next(3);
    for (int i = 0; i < 2 * kMessages; ++i) {
      const std::optional<Arrival> arrival = nodes[self]->Receive();
      ASSERT_TRUE(arrival);
      const uint64_t number = next[arrival->peer]++;
      ASSERT_TRUE(IsIntact(*arrival, {.src = arrival->peer,
                                      .dst = self,
                                      .number = number,
                                      .bytes = MixedBytes(static_cast<int>(number))}));
    }
  }
}

TEST_P(UcxWireTest, AnyThreadMaySend) {
  const Nodes nodes = ConnectedNodes(2);
  constexpr int kThreads = 4;
  constexpr int kEach = 200;
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&nodes, t] {
      for (int i = 0; i < kEach; ++i) nodes[0]->Send(1, t * kEach + i, 1000 + t);
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::vector<int> seen(kThreads);  // the messages of one thread keep their order
  for (int i = 0; i < kThreads * kEach; ++i) {
    const std::optional<Arrival> arrival = nodes[1]->Receive();
    ASSERT_TRUE(arrival);
    const auto thread = static_cast<int>(arrival->note.number) / kEach;
    EXPECT_EQ(arrival->note.number, thread * kEach + seen[thread]++);
    EXPECT_TRUE(IsIntact(*arrival, arrival->note));
  }
}

TEST_P(UcxWireTest, APeerMaySendBeforeThisEndHasConnected) {
  const Nodes nodes = MakeNodes(2);
  nodes[0]->wire().Connect(AddressesOf(nodes));
  const Note small = nodes[0]->Send(1, 0, 10);
  const Note large = nodes[0]->Send(1, 1, 1 << 20);
  const std::optional<Arrival> first = nodes[1]->Receive();
  ASSERT_TRUE(first);
  EXPECT_TRUE(IsIntact(*first, small));
  nodes[1]->wire().Connect(AddressesOf(nodes));
  const std::optional<Arrival> second = nodes[1]->Receive();
  ASSERT_TRUE(second);
  EXPECT_TRUE(IsIntact(*second, large));
}

TEST_P(UcxWireTest, WhatIsSentBeforeConnectWaitsForIt) {
  const Nodes nodes = MakeNodes(2);
  const Note note = nodes[0]->Send(1, 0, 10);
  std::this_thread::sleep_for(milliseconds(50));
  EXPECT_EQ(nodes[0]->num_unsent(), 1);
  for (const auto& node : nodes) node->wire().Connect(AddressesOf(nodes));
  const std::optional<Arrival> arrival = nodes[1]->Receive();
  ASSERT_TRUE(arrival);
  EXPECT_TRUE(IsIntact(*arrival, note));
}

TEST_P(UcxWireTest, PeersHaveBeenHeardOfOnceAllHaveConnected) {
  const Nodes nodes = MakeNodes(3);
  for (const int32_t early : {0, 1}) nodes[early]->wire().Connect(AddressesOf(nodes));
  nodes[1]->Send(0, 0, 10);
  ASSERT_TRUE(nodes[0]->Receive());  // so that it has been heard of, however busy the machine is
  const std::vector<Wire::Unreached> unreached = nodes[0]->wire().AwaitPeers(milliseconds(300));
  ASSERT_EQ(unreached.size(), 1U);
  EXPECT_EQ(unreached[0].peer, 2);
  EXPECT_EQ(unreached[0].reason, "no answer within 0.3 s");
  const std::optional<Loss> loss = nodes[0]->WaitForLoss();  // from then on
  ASSERT_TRUE(loss);
  EXPECT_EQ(loss->peer, 2);
  EXPECT_EQ(loss->reason, "no answer within 0.3 s");
  nodes[2]->wire().Connect(AddressesOf(nodes));
  EXPECT_TRUE(nodes[1]->wire().AwaitPeers(Node::kPatience).empty());
}

TEST_P(UcxWireTest, APeerThatClosedInsteadOfConnectingIsNotWaitedFor) {
  const Nodes nodes = MakeNodes(2);
  for (const auto& node : nodes) node->wire().Connect(AddressesOf(nodes));
  nodes[1]->wire().Close();
  // It may have been heard before.
  for (const auto& [peer, reason] : nodes[0]->wire().AwaitPeers(Node::kPatience)) {
    EXPECT_EQ(peer, 1);
    EXPECT_EQ(reason, "it closed its end");
  }
}

TEST(UcxWireConnectTest, AnAddressThatLeadsNowhereIsALoss) {
  SMF_NEED_UCX();
  setenv("UCX_TLS", "tcp", 1);
  const Nodes nodes = MakeNodes(2);
  std::vector<std::string> addresses = AddressesOf(nodes);
  addresses[1] = [] {
    return MakeNodes(2)[1]->wire().address();
  }();  // the address of a process that is gone
  nodes[0]->wire().Connect(addresses);
  const std::vector<Wire::Unreached> unreached = nodes[0]->wire().AwaitPeers(Node::kPatience);
  unsetenv("UCX_TLS");
  ASSERT_EQ(unreached.size(), 1U);
  EXPECT_EQ(unreached[0].peer, 1);
  EXPECT_EQ(unreached[0].reason.find("no answer"), std::string::npos);
  EXPECT_EQ(nodes[0]->WaitForLoss()->peer, 1);
}

TEST_P(UcxWireTest, CloseDeliversWhatWasSent) {
  Nodes nodes = ConnectedNodes(2);
  std::vector<Note> notes;
  notes.reserve(50);
  for (int i = 0; i < 50; ++i) notes.push_back(nodes[0]->Send(1, i, MixedBytes(i)));
  nodes[0]->wire().Close();
  EXPECT_EQ(nodes[0]->num_unsent(), 0);
  nodes[0].reset();
  for (const Note& note : notes) {
    const std::optional<Arrival> arrival = nodes[1]->Receive();
    ASSERT_TRUE(arrival);
    EXPECT_TRUE(IsIntact(*arrival, note));
  }
  const std::optional<Loss> loss = nodes[1]->WaitForLoss();
  ASSERT_TRUE(loss);
  EXPECT_EQ(loss->peer, 0);
  EXPECT_EQ(loss->reason, "it closed its end");
  EXPECT_FALSE(nodes[1]->WaitForLoss(milliseconds(1500)));  // it is reported only once
}

TEST_P(UcxWireTest, CloseAtOnceOnBothSides) {
  for (int i = 0; i < 5; ++i) {
    const Nodes nodes = ConnectedNodes(2);
    for (int j = 0; j < 20; ++j) {
      nodes[0]->Send(1, j, MixedBytes(j));
      nodes[1]->Send(0, j, MixedBytes(j));
    }
    std::thread other([&nodes] { nodes[1]->wire().Close(); });
    nodes[0]->wire().Close();
    other.join();
    EXPECT_EQ(nodes[0]->num_unsent(), 0);
    EXPECT_EQ(nodes[1]->num_unsent(), 0);
  }
}

TEST_P(UcxWireTest, CloseWithoutConnect) {
  const Nodes nodes = MakeNodes(2);
  nodes[0]->wire().Close();
  nodes[0]->wire().Close();
}

TEST_P(UcxWireTest, SendsAfterCloseAreDropped) {
  const Nodes nodes = ConnectedNodes(2);
  nodes[0]->wire().Close();
  nodes[0]->Send(1, 0, 100);
  EXPECT_EQ(nodes[0]->num_unsent(), 0);
}

TEST_P(UcxWireTest, SendsToAPeerThatClosedAreDropped) {
  Nodes nodes = ConnectedNodes(3);
  nodes[1].reset();
  ASSERT_TRUE(nodes[0]->WaitForLoss());
  nodes[0]->Send(1, 0, 1 << 20);
  const Note note = nodes[0]->Send(2, 1, 1 << 20);
  EXPECT_TRUE(nodes[0]->WaitUntilSent());
  const std::optional<Arrival> arrival = nodes[2]->Receive();
  ASSERT_TRUE(arrival);
  EXPECT_TRUE(IsIntact(*arrival, note));
}

TEST_P(UcxWireTest, AMessageWithoutAPlaceLosesItsSender) {
  const Nodes nodes = ConnectedNodes(2);
  nodes[0]->Send(1, 0, Node::kMaxPayloadBytes + 1);
  const std::optional<Loss> loss = nodes[1]->WaitForLoss();
  ASSERT_TRUE(loss);
  EXPECT_EQ(loss->peer, 0);
  EXPECT_EQ(loss->reason, "it sent 67108865 bytes that have no place here");
}

double CpuSeconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
         1e-6 * static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

TEST_P(UcxWireTest, AnIdleWireLeavesTheProcessorAlone) {
  const Nodes nodes = ConnectedNodes(2);
  nodes[0]->Send(1, 0, 100);
  ASSERT_TRUE(nodes[1]->Receive());
  std::this_thread::sleep_for(milliseconds(200));
  const double before = CpuSeconds();
  std::this_thread::sleep_for(milliseconds(1000));
  EXPECT_LT(CpuSeconds() - before, 0.1);
}

}  // namespace
}  // namespace jax_sm_free
