#include "cc/cuda/status_fault.h"

#include <bit>
#include <string>

#include "cc/token.h"
#include "gtest/gtest.h"

namespace jax_sm_free::cuda {
namespace {

RankView View() {
  RankView view{};
  view.config = {.ep_size = 4, .num_experts = 8, .top_k = 2, .max_tokens = 16, .timeout_s = 1.5};
  view.buffer_id = 7;
  view.rank = 2;
  return view;
}

Status Of(FaultCode code, Op op) {
  Status status{};
  status.code = static_cast<int32_t>(code);
  status.op = static_cast<int32_t>(op);
  status.peer = -1;
  status.slot = 1;
  status.sequence = 12;
  return status;
}

std::string Text(Status status) {
  const std::optional<Fault> fault = FaultIn(status, View());
  return fault ? fault->Describe() : "";
}

TEST(StatusFaultTest, NothingUntilACodeIsThere) {
  EXPECT_EQ(Text(Of(FaultCode::kNone, Op::kDispatchRecv)), "");
}

TEST(StatusFaultTest, TimeoutNamesAllThatIsMissing) {
  Status status = Of(FaultCode::kTimeout, Op::kDispatchRecv);
  status.peer = 1;
  status.seen = 10;
  status.detail = 0b1010;
  EXPECT_EQ(Text(status),
            "jax_sm_free: dispatch_recv on rank 2, peer rank 1: expected messages from 4 ranks "
            "within 1.5 s, seen 2 after 1.5 s, none from rank 1, 3, whose last in this slot was of "
            "exchange 10 [dispatch exchange 12, slot 1]");
}

TEST(StatusFaultTest, AcknowledgementThatDoesNotCome) {
  Status status = Of(FaultCode::kAckTimeout, Op::kCombineSend);
  status.peer = 3;
  status.expected = 11;
  status.seen = 9;
  EXPECT_EQ(Text(status),
            "jax_sm_free: combine_send on rank 2, peer rank 3: expected rank 3 to have read "
            "exchange 11 within 1.5 s, seen none read after exchange 9 "
            "[combine exchange 12, slot 1]");
}

TEST(StatusFaultTest, TokensAddedUp) {
  Status status = Of(FaultCode::kToken, Op::kDispatchRecv);
  status.seen = std::bit_cast<int32_t>(2 * kTokenMagic);
  status.sequence = 0;
  EXPECT_EQ(Text(status),
            "jax_sm_free: dispatch_recv on rank 2: expected the token of one send, seen the sum of "
            "2 tokens: a sent value was used more than once");
}

TEST(StatusFaultTest, TokenOfAnotherRank) {
  Status status = Of(FaultCode::kTokenOrigin, Op::kCombineRecv);
  status.seen = 1;
  status.detail = 6;
  status.sequence = 0;
  EXPECT_EQ(Text(status),
            "jax_sm_free: combine_recv on rank 2: expected a token of buffer 7, rank 2, seen one "
            "of buffer 6, rank 1");
}

TEST(StatusFaultTest, IndexNamesTokenAndK) {
  Status status = Of(FaultCode::kIndex, Op::kDispatchSend);
  status.seen = 99;
  status.detail = 9;
  EXPECT_EQ(Text(status),
            "jax_sm_free: dispatch_send on rank 2: expected topk_idx in [-1, 8), seen 99 at token "
            "4, k 1 [dispatch exchange 12, slot 1]");
}

TEST(StatusFaultTest, MessageOfARankOutOfStep) {
  Status status = Of(FaultCode::kOutOfStep, Op::kCombineRecv);
  status.peer = 0;
  status.expected = 128;
  status.seen = 64;
  status.detail = int64_t{5} << 32 | 3;
  EXPECT_EQ(Text(status),
            "jax_sm_free: combine_recv on rank 2, peer rank 0: expected 5 rows of 128 bytes, seen "
            "3 rows of 64 bytes [combine exchange 12, slot 1]");
}

TEST(StatusFaultTest, EveryCodeHasItsWords) {
  for (int32_t code = 1; code <= static_cast<int32_t>(FaultCode::kStopped); ++code) {
    const std::string text = Text(Of(static_cast<FaultCode>(code), Op::kDispatchRecv));
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
