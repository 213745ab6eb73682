#include "cc/cuda/host/status_fault.h"

#include <bit>
#include <string>

#include "cc/token.h"
#include "gtest/gtest.h"

namespace jax_sm_free::cuda {
namespace {

RankView View() {
  const Config config = {
      .ep_size = 4, .num_experts = 8, .top_k = 2, .max_tokens = 16, .timeout_s = 1.5};
  RankView view = ViewOf(config, 2);
  view.buffer_id = 7;
  return view;
}

FaultRecord Of(FaultCode code, Op op) {
  FaultRecord record{};
  record.code = static_cast<int32_t>(code);
  record.op = static_cast<int32_t>(op);
  record.peer = -1;
  record.slot = 1;
  record.sequence = 12;
  return record;
}

std::string Text(FaultRecord record, double waited_s = View().config.timeout_s) {
  const std::optional<Fault> fault = FaultIn(record, View(), waited_s);
  return fault ? fault->Describe() : "";
}

TEST(StatusFaultTest, NothingUntilACodeIsThere) {
  EXPECT_EQ(Text(Of(FaultCode::kNone, Op::kDispatchRecv)), "");
}

TEST(StatusFaultTest, TimeoutNamesAllThatIsMissing) {
  FaultRecord record = Of(FaultCode::kTimeout, Op::kDispatchRecv);
  record.peer = 1;
  record.seen = 10;
  record.detail = 0b1010;
  EXPECT_EQ(Text(record),
            "jax_sm_free: dispatch_recv on rank 2, peer rank 1: expected messages from 4 ranks "
            "within 1.5 s, seen 2 after 1.5 s, none from rank 1, 3, whose last in this slot was of "
            "exchange 10 [dispatch exchange 12, slot 1]");
}

TEST(StatusFaultTest, WaitThatGoesOnNamesTheTimeSoFar) {
  FaultRecord record = Of(FaultCode::kTimeout, Op::kCombineRecv);
  record.peer = 3;
  record.seen = 11;
  record.detail = 0b1000;
  EXPECT_EQ(Text(record, 0.5),
            "jax_sm_free: combine_recv on rank 2, peer rank 3: expected messages from 4 ranks "
            "within 1.5 s, seen 3 after 0.5 s, none from rank 3, whose last in this slot was of "
            "exchange 11 [combine exchange 12, slot 1]");
}

TEST(StatusFaultTest, AcknowledgementThatDoesNotCome) {
  FaultRecord record = Of(FaultCode::kAckTimeout, Op::kCombineSend);
  record.peer = 3;
  record.expected = 11;
  record.seen = 9;
  EXPECT_EQ(Text(record),
            "jax_sm_free: combine_send on rank 2, peer rank 3: expected rank 3 to have read "
            "exchange 11 within 1.5 s, seen none read after exchange 9 "
            "[combine exchange 12, slot 1]");
}

TEST(StatusFaultTest, TokensAddedUp) {
  FaultRecord record = Of(FaultCode::kToken, Op::kDispatchRecv);
  record.seen = std::bit_cast<int32_t>(2 * kTokenMagic);
  record.sequence = 0;
  EXPECT_EQ(Text(record),
            "jax_sm_free: dispatch_recv on rank 2: expected the token of one send, seen the sum of "
            "2 tokens: a sent value was used more than once");
}

TEST(StatusFaultTest, TokenOfAnotherRank) {
  FaultRecord record = Of(FaultCode::kTokenOrigin, Op::kCombineRecv);
  record.seen = 1;
  record.detail = 6;
  record.sequence = 0;
  EXPECT_EQ(Text(record),
            "jax_sm_free: combine_recv on rank 2: expected a token of buffer 7, rank 2, seen one "
            "of buffer 6, rank 1");
}

TEST(StatusFaultTest, InTwoTiersFaultsNameNodes) {
  Config config = View().config;
  config.num_nodes = 2;
  config.node_stride = 2;
  RankView view = ViewOf(config, 2);
  const auto text = [&](FaultRecord record) {
    return FaultIn(record, view, config.timeout_s)->Describe();
  };
  FaultRecord record = Of(FaultCode::kTimeout, Op::kDispatchForward);
  record.peer = 0;
  record.seen = 10;
  record.detail = 0b0001;
  EXPECT_EQ(text(record),
            "jax_sm_free: dispatch_forward on rank 2 of node 1, peer rank 0 of node 0: expected "
            "messages from 1 ranks within 1.5 s, seen 0 after 1.5 s, none from rank 0, whose last "
            "in this slot was of exchange 10 [dispatch exchange 12, slot 1]");
  record = Of(FaultCode::kTokenUsed, Op::kCombineForward);
  record.seen = 12;
  EXPECT_EQ(text(record),
            "jax_sm_free: combine_forward on rank 2 of node 1: expected one forward of each "
            "exchange, seen a second one of exchange 12 [combine exchange 12, slot 1]");
  record = Of(FaultCode::kIndex, Op::kCombineForward);
  record.seen = 4;
  record.detail = 9;
  EXPECT_EQ(text(record),
            "jax_sm_free: combine_forward on rank 2 of node 1: expected layout.node_topk in "
            "[-1, 4), seen 4 at row 4, k 1 [combine exchange 12, slot 1]");
}

TEST(StatusFaultTest, IndexNamesTokenAndK) {
  FaultRecord record = Of(FaultCode::kIndex, Op::kDispatchSend);
  record.seen = 99;
  record.detail = 9;
  EXPECT_EQ(Text(record),
            "jax_sm_free: dispatch_send on rank 2: expected topk_idx in [-1, 8), seen 99 at token "
            "4, k 1 [dispatch exchange 12, slot 1]");
}

TEST(StatusFaultTest, MessageOfARankOutOfStep) {
  FaultRecord record = Of(FaultCode::kOutOfStep, Op::kCombineRecv);
  record.peer = 0;
  record.expected = 128;
  record.seen = 64;
  record.detail = int64_t{5} << 32 | 3;
  EXPECT_EQ(Text(record),
            "jax_sm_free: combine_recv on rank 2, peer rank 0: expected 5 rows of 128 bytes, seen "
            "3 rows of 64 bytes [combine exchange 12, slot 1]");
}

TEST(StatusFaultTest, EveryCodeHasItsWords) {
  for (int32_t code = 1; code <= static_cast<int32_t>(FaultCode::kStopped); ++code) {
    FaultRecord record = Of(static_cast<FaultCode>(code), Op::kDispatchRecv);
    record.detail = 1;
    const std::string text = Text(record);
    EXPECT_EQ(text.find("fault code"), std::string::npos) << text;
  }
}

TEST(StatusFaultTest, OnlyWhatFollowsFromAnotherFaultIsAnEcho) {
  EXPECT_TRUE(IsEcho(Of(FaultCode::kPeer, Op::kDispatchRecv)));
  EXPECT_TRUE(IsEcho(Of(FaultCode::kStopped, Op::kDispatchRecv)));
  EXPECT_FALSE(IsEcho(Of(FaultCode::kTimeout, Op::kDispatchRecv)));
}

}  // namespace
}  // namespace jax_sm_free::cuda
