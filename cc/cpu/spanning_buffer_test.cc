#include "cc/cpu/spanning_buffer.h"

#include <chrono>
#include <cstring>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cc/cpu/cable_testing.h"
#include "cc/cpu/call_site.h"
#include "cc/cpu/exchange.h"
#include "cc/cpu/hop.h"
#include "cc/cpu/message.h"
#include "cc/cpu/wire_note.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using testing::Cable;
using ::testing::IsSubstring;

constexpr double kNever = 600;
constexpr double kSoon = 0.2;

// The content of the one row of a message.
struct Note {
  ExchangeKey key;
  int32_t src = 0;
  int32_t dst = 0;

  bool operator==(const Note&) const = default;
};

// Ranks by member, in one group or several. Each process has `kRanksOf` of them.
class SpanningBufferTest : public ::testing::Test {
 protected:
  static constexpr int32_t kProcesses = 3;
  static constexpr int32_t kRanksOf = 2;
  static constexpr int32_t kRanks = kProcesses * kRanksOf;

  void Open(double timeout_s = kNever, int32_t num_groups = 1, int32_t num_nodes = 1) {
    config_ = {.ep_size = kRanks / num_groups,
               .num_experts = kRanks,
               .num_slots = 2,
               .row_bytes = sizeof(Note),
               .timeout_s = timeout_s,
               .num_nodes = num_nodes,
               .node_stride = kRanks / num_groups / num_nodes};
    cable_.ends.resize(kProcesses);
    SpanningBuffer::Processes processes{.self = 0, .count = kProcesses, .of_rank = {}};
    processes.of_rank.resize(num_groups);
    for (int32_t member = 0; member < kRanks; ++member) {
      processes.of_rank[member / config_.ep_size].push_back(member / kRanksOf);
    }
    for (processes.self = 0; processes.self < kProcesses; ++processes.self) {
      std::vector<std::optional<Place>> places;
      for (int32_t i = 0; i < kRanksOf; ++i) {
        const int32_t member = processes.self * kRanksOf + i;
        places.emplace_back(Place{.group = member / config_.ep_size,
                                  .rank = member % config_.ep_size,
                                  .position = member});
      }
      const auto open_wire = [&](Wire::Callbacks callbacks) -> Result<std::unique_ptr<Wire>> {
        auto end = std::make_unique<Cable::End>(cable_, processes.self, std::move(callbacks));
        cable_.ends[processes.self] = end.get();
        return std::unique_ptr<Wire>(std::move(end));
      };
      buffers_.push_back(
          std::get<0>(SpanningBuffer::Open(7, config_, places, processes, open_wire)));
    }
  }

  ~SpanningBufferTest() override {
    for (const auto& buffer : buffers_) buffer->Close();
  }

  SpanningBuffer& BufferOf(int32_t rank) { return *buffers_[rank / kRanksOf]; }
  HostRank& RankOf(int32_t rank) { return *BufferOf(rank).RankOf(rank % kRanksOf); }

  // The exchange that a send has begun, or its fault.
  Result<Exchange> Send(int32_t rank, int64_t host_run, const std::string& program = "jit_f") {
    HostRank& self = RankOf(rank);
    Result<Exchange> begun = self.ledger.Begin(Op::kCombineSend, host_run, 5);
    if (FaultOf(begun) != nullptr) return begun;
    const auto& exchange = std::get<Exchange>(begun);
    auto site = std::make_shared<CallSite>(
        CallSite{.number = 5, .program = program, .call = "combine_send 0"});
    if (auto fault = self.transport->Begin(Op::kCombineSend, exchange, rank, site)) return *fault;
    const int32_t first = rank - rank % config_.ep_size;
    for (int32_t dst = first; dst < first + config_.ep_size; ++dst) {
      if (auto fault =
              self.transport->Send(exchange.key, rank, dst, Pack(exchange.key, rank, dst))) {
        return *fault;
      }
    }
    self.transport->Finish(exchange.key, rank);
    return begun;
  }

  Message Pack(const ExchangeKey& key, int32_t src, int32_t dst) {
    const MessageHeader header{
        .kind = static_cast<int32_t>(Kind::kCombine), .num_rows = 1, .row_bytes = sizeof(Note)};
    Message message(RankOf(src).pool.Take(), config_, header);
    const Note note{key, src, dst};
    std::memcpy(message.row(0), &note, sizeof(note));
    return message;
  }

  std::future<Transport::Arrival> Receive(int32_t rank, const Exchange& exchange) {
    auto promise = std::make_shared<std::promise<Transport::Arrival>>();
    RankOf(rank).transport->Receive(
        Op::kCombineRecv, exchange, rank,
        [promise](Transport::Arrival arrival) { promise->set_value(std::move(arrival)); });
    return promise->get_future();
  }

  // One round of all ranks. Every process has a name of its own for the run.
  void Round(int64_t run) {
    std::vector<std::future<Transport::Arrival>> arrivals;
    for (int32_t rank = 0; rank < kRanks; ++rank) {
      const Result<Exchange> sent = Send(rank, int64_t{1000000} * (rank / kRanksOf) + run);
      ASSERT_EQ(FaultOf(sent), nullptr);
      const auto& exchange = std::get<Exchange>(sent);
      EXPECT_EQ(exchange.key, (ExchangeKey{.run = run, .call_site = 5, .count = 0}));
      arrivals.push_back(Receive(rank, exchange));
      RankOf(rank).ledger.Release(exchange);
    }
    for (int32_t dst = 0; dst < kRanks; ++dst) {
      Transport::Arrival arrival = arrivals[dst].get();
      ASSERT_EQ(FaultOf(arrival), nullptr) << FaultOf(arrival)->Describe();
      const auto& messages = std::get<std::vector<Message>>(arrival);
      for (int32_t src = 0; src < kRanks; ++src) {
        Note note;
        std::memcpy(&note, messages[src].row(0), sizeof(note));
        EXPECT_EQ(note, (Note{{run, 5, 0}, src, dst}));
      }
    }
  }

  // Expects that `rank` and all later ranks end with a fault that contains `text`.
  void ExpectEnded(int32_t rank, const Exchange& exchange, const std::string& text) {
    const Transport::Arrival arrival = Receive(rank, exchange).get();
    ASSERT_NE(FaultOf(arrival), nullptr);
    EXPECT_PRED_FORMAT2(IsSubstring, text, FaultOf(arrival)->Describe());
    EXPECT_PRED_FORMAT2(IsSubstring, text, BufferOf(rank).TakeFault().value_or(""));
    EXPECT_PRED_FORMAT2(IsSubstring, text, BufferOf(rank).TakeFault().value_or(""));
    EXPECT_NE(FaultOf(Send(rank, 99)), nullptr);
  }

  Config config_;
  Cable cable_;
  std::vector<std::shared_ptr<SpanningBuffer>> buffers_;
};

TEST_F(SpanningBufferTest, EveryRankGetsWhatEveryOtherSent) {
  Open();
  for (int64_t run = 0; run < 50; ++run) Round(run);
}

TEST_F(SpanningBufferTest, AFaultEndsTheBufferInAllProcesses) {
  Open();
  const auto exchange = std::get<Exchange>(Send(0, 1));
  const auto other = std::get<Exchange>(Send(4, 1));
  RankOf(3).transport->Fail(0, {.op = "dispatch_send",
                                .rank = 3,
                                .expected = "good indices",
                                .seen = "a bad one",
                                .exchange = {}});
  ExpectEnded(0, exchange, "dispatch_send on rank 3: expected good indices, seen a bad one");
  ExpectEnded(4, other, "dispatch_send on rank 3: expected good indices, seen a bad one");
}

TEST_F(SpanningBufferTest, AFaultIsPassedOnByWhoIsToldOfIt) {
  Open();
  const auto exchange = std::get<Exchange>(Send(4, 1));
  cable_.ends[1]->MuteFor(2);
  RankOf(3).transport->Fail(
      0, {.op = "dispatch_send", .rank = 3, .expected = "x", .seen = "y", .exchange = {}});
  ExpectEnded(4, exchange, "dispatch_send on rank 3: expected x, seen y");
}

TEST_F(SpanningBufferTest, ASilentRankEndsTheBufferInAllProcesses) {
  Open(kSoon);
  std::vector<std::pair<int32_t, Exchange>> sent;
  for (const int32_t rank : {0, 1, 2, 3, 4}) sent.emplace_back(rank, std::get<0>(Send(rank, 1)));
  for (const auto& [rank, exchange] : sent) ExpectEnded(rank, exchange, "none from rank 5");
}

TEST_F(SpanningBufferTest, AProcessThatIsGoneEndsWhoWaitsForIt) {
  Open();
  const auto exchange = std::get<Exchange>(Send(0, 1));
  const auto other = std::get<Exchange>(Send(2, 1));
  std::future<Transport::Arrival> waits = Receive(0, exchange);
  cable_.ends[0]->Lose(2);
  const Transport::Arrival arrival = waits.get();
  ASSERT_NE(FaultOf(arrival), nullptr);
  EXPECT_PRED_FORMAT2(IsSubstring, "peer rank 4: expected a message from rank 4",
                      FaultOf(arrival)->Describe());
  EXPECT_PRED_FORMAT2(IsSubstring, "it was cut", FaultOf(arrival)->Describe());
  ExpectEnded(2, other, "it was cut");
}

TEST_F(SpanningBufferTest, WhatHasArrivedFromAProcessThatIsGoneIsGood) {
  Open();
  std::vector<Exchange> sent;
  sent.reserve(kRanks);
  for (int32_t rank = 0; rank < kRanks; ++rank) sent.push_back(std::get<0>(Send(rank, 1)));
  cable_.ends[0]->Lose(2);  // after its messages
  const Transport::Arrival arrival = Receive(0, sent[0]).get();
  EXPECT_EQ(FaultOf(arrival), nullptr);
  EXPECT_EQ(BufferOf(0).TakeFault(), std::nullopt);
}

TEST_F(SpanningBufferTest, ProcessesThatRunOtherProgramsEndBoth) {
  Open();
  const auto exchange = std::get<Exchange>(Send(0, 1, "jit_f"));
  (void)Send(4, 1, "jit_g");
  for (const std::string text : {"jit_f", "jit_g", "run 0 of this buffer"}) {
    const Transport::Arrival arrival = Receive(0, exchange).get();
    ASSERT_NE(FaultOf(arrival), nullptr);
    EXPECT_PRED_FORMAT2(IsSubstring, text, FaultOf(arrival)->Describe());
  }
}

TEST_F(SpanningBufferTest, ARankThatLeftOutAPartOfARunIsNamedByItsNext) {
  Open();
  const auto exchange = std::get<Exchange>(Send(0, 1));
  std::future<Transport::Arrival> waits = Receive(0, exchange);
  (void)RankOf(4).ledger.Begin(Op::kCombineSend, 1, 5);  // and it sends nothing
  (void)Send(4, 2);
  const Transport::Arrival arrival = waits.get();
  ASSERT_NE(FaultOf(arrival), nullptr);
  EXPECT_PRED_FORMAT2(IsSubstring, "a message from rank 4, seen it has begun run 1",
                      FaultOf(arrival)->Describe());
}

// Members 0 to 2 are one group, and members 3 to 5 another group. Process 1 has ranks of both.
TEST_F(SpanningBufferTest, AGroupIsThroughWhenTheOtherHasSent) {
  Open(kNever, 2);
  std::vector<std::future<Transport::Arrival>> waiting;
  for (const int32_t member : {0, 1, 2, 3}) {
    waiting.push_back(Receive(member, std::get<Exchange>(Send(member, 1))));
  }
  (void)Send(4, 1);
  const std::chrono::duration<double> long_enough(2 * AllGroups::kPatienceSeconds);
  EXPECT_EQ(waiting[0].wait_for(long_enough), std::future_status::timeout);
  (void)Send(5, 1);
  for (auto& arrival : waiting) EXPECT_EQ(FaultOf(arrival.get()), nullptr);
}

TEST_F(SpanningBufferTest, ASilentRankEndsTheOtherGroupToo) {
  Open(kSoon, 2);
  std::vector<std::pair<int32_t, Exchange>> sent;
  for (const int32_t rank : {0, 1, 2, 3, 4}) sent.emplace_back(rank, std::get<0>(Send(rank, 1)));
  std::future<Transport::Arrival> through = Receive(0, sent[0].second);
  for (const auto& [rank, exchange] : sent) {
    if (rank >= 3) ExpectEnded(rank, exchange, "none from rank 2");
  }
  const Transport::Arrival arrival = through.get();
  ASSERT_NE(FaultOf(arrival), nullptr);
  EXPECT_PRED_FORMAT2(IsSubstring, "none from rank 2", FaultOf(arrival)->Describe());
}

TEST_F(SpanningBufferTest, AFaultIsToldOnStderrWhereItWasMet) {
  Open();
  const auto exchange = std::get<Exchange>(Send(0, 1));
  ::testing::internal::CaptureStderr();
  RankOf(3).transport->Fail(
      0, {.op = "dispatch_send", .rank = 3, .expected = "x", .seen = "y", .exchange = {}});
  ExpectEnded(0, exchange, "dispatch_send on rank 3: expected x, seen y");
  EXPECT_EQ(::testing::internal::GetCapturedStderr(),
            "jax_sm_free: dispatch_send on rank 3: expected x, seen y\n");
}

TEST_F(SpanningBufferTest, ClosingEndsWhoWaitsHere) {
  Open();
  const auto exchange = std::get<Exchange>(Send(0, 1));
  std::future<Transport::Arrival> waits = Receive(0, exchange);
  BufferOf(0).Close();
  const Transport::Arrival arrival = waits.get();
  ASSERT_NE(FaultOf(arrival), nullptr);
  EXPECT_PRED_FORMAT2(IsSubstring, "it was closed", FaultOf(arrival)->Describe());
}

// Two tiers, in which each process is a node.
class TiersOverProcessesTest : public SpanningBufferTest {
 protected:
  // What arrives at rank 0 in a round in which processes send it messages of these numbers.
  Transport::Arrival Arrived(Hop hop, const std::vector<std::pair<int32_t, int32_t>>& sent) {
    Open(kNever, 1, kProcesses);
    Exchange exchange = std::get<Exchange>(RankOf(0).ledger.Begin(Op::kDispatchSend, 1, 5));
    exchange.key.hop = hop;
    std::future<Transport::Arrival> arrival = Receive(0, exchange);
    for (const auto& [process, number] : sent) {
      const CallSite site{.number = 5, .program = "jit_f", .call = "dispatch_send 0"};
      const MessageNote note{.src = number, .dst = 0, .key = exchange.key, .site = site};
      const Message message = Pack(exchange.key, number, 0);
      cable_.ends[process]->Send(0, Encode({.buffer = 7, .body = note}), message.bytes(), [] {});
    }
    return arrival.get();
  }

  void ExpectRefused(const Transport::Arrival& arrival, const std::string& text) {
    ASSERT_NE(FaultOf(arrival), nullptr);
    EXPECT_PRED_FORMAT2(IsSubstring, "receive on rank 0 of node 0", FaultOf(arrival)->Describe());
    EXPECT_PRED_FORMAT2(IsSubstring, text, FaultOf(arrival)->Describe());
  }
};

TEST_F(TiersOverProcessesTest, RailMessagesComeFromTheRailPeers) {
  const Transport::Arrival arrival = Arrived(Hop::kRail, {{1, 2}, {2, 4}});
  EXPECT_EQ(FaultOf(arrival), nullptr);
}

TEST_F(TiersOverProcessesTest, AMessageByAProcessThatDoesNotCarryItIsRefused) {
  ExpectRefused(Arrived(Hop::kRail, {{2, 2}}), "one from member 2 to member 0 by process 2");
}

TEST_F(TiersOverProcessesTest, OnlyTheOwnNodeForwardsTheMessagesOfOthers) {
  ExpectRefused(Arrived(Hop::kSpread, {{1, 3}}), "one from member 3 to member 0 by process 1");
}

TEST_F(TiersOverProcessesTest, ARailMessageOfAnotherRailIsRefused) {
  ExpectRefused(Arrived(Hop::kRail, {{1, 3}}), "one from member 3 to member 0 by process 1");
}

}  // namespace
}  // namespace jax_sm_free
