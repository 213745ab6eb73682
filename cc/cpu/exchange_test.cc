#include "cc/cpu/exchange.h"

#include <array>
#include <limits>
#include <string>
#include <thread>
#include <unordered_set>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using ::testing::IsSubstring;

constexpr Op kSend = Op::kDispatchSend;
constexpr Op kRecv = Op::kDispatchRecv;
constexpr Op kOtherRecv = Op::kCombineRecv;
constexpr int64_t kBufferId = 6;
constexpr int32_t kRank = 3;
constexpr int kMaxRuns = 64;

using Token = std::array<float, kTokenSize>;

Exchange Begun(Ledger& ledger, int64_t run, int64_t call_site = 0) {
  const Result<Exchange> result = ledger.Begin(kSend, run, call_site);
  EXPECT_EQ(FaultOf(result), nullptr);
  return FaultOf(result) == nullptr ? std::get<Exchange>(result) : Exchange{};
}

Token TokenOf(const Ledger& ledger, const Exchange& exchange) {
  Token token;
  token.fill(std::numeric_limits<float>::quiet_NaN());
  ledger.WriteToken(exchange, token.data());
  return token;
}

// Whether `token` could be received. The exchange is over afterwards.
bool Receive(Ledger& ledger, const Token& token) {
  const Result<Exchange> result = ledger.Finish(kRecv, token.data());
  if (FaultOf(result) != nullptr) return false;
  ledger.Release(std::get<Exchange>(result));
  return true;
}

std::string SeenByRecv(Ledger& ledger, const Token& token, Op op = kRecv) {
  const Result<Exchange> result = ledger.Finish(op, token.data());
  return FaultOf(result) == nullptr ? "no fault" : FaultOf(result)->seen;
}

class LedgerTest : public ::testing::Test {
 protected:
  Ledger ledger_{kBufferId, kRank, {.num_slots = 2}};
};

TEST_F(LedgerTest, FinishFindsTheExchangeOfTheToken) {
  const Exchange sent = Begun(ledger_, 5, 9);
  const Result<Exchange> result = ledger_.Finish(kRecv, TokenOf(ledger_, sent).data());
  ASSERT_EQ(FaultOf(result), nullptr);
  EXPECT_EQ(std::get<Exchange>(result).sequence, sent.sequence);
  EXPECT_EQ(std::get<Exchange>(result).key, sent.key);
  EXPECT_EQ(std::get<Exchange>(result).slot, sent.slot);
}

TEST_F(LedgerTest, FinishesInAnyOrder) {
  const Token first = TokenOf(ledger_, Begun(ledger_, 1));
  const Token second = TokenOf(ledger_, Begun(ledger_, 1));
  EXPECT_TRUE(Receive(ledger_, second));
  const Token third = TokenOf(ledger_, Begun(ledger_, 1));
  EXPECT_TRUE(Receive(ledger_, third));
  EXPECT_TRUE(Receive(ledger_, first));
}

TEST_F(LedgerTest, KeyCountsThePassesOfACallSiteInARun) {
  const Exchange first = Begun(ledger_, 1, 7);
  const Exchange second = Begun(ledger_, 1, 7);
  const Exchange other_run = Begun(ledger_, 2, 7);
  EXPECT_EQ(first.key, (ExchangeKey{.run = 1, .call_site = 7, .count = 0}));
  EXPECT_EQ(second.key, (ExchangeKey{.run = 1, .call_site = 7, .count = 1}));
  EXPECT_EQ(other_run.key, (ExchangeKey{.run = 2, .call_site = 7, .count = 0}));
}

TEST_F(LedgerTest, KeysDoNotDependOnTheOrderOfCallSites) {
  Ledger other(kBufferId, kRank + 1, {.num_slots = 2});
  const Exchange a = Begun(ledger_, 1, 10);
  const Exchange b = Begun(ledger_, 1, 20);
  EXPECT_EQ(Begun(other, 1, 20).key, b.key);
  EXPECT_EQ(Begun(other, 1, 10).key, a.key);
}

TEST_F(LedgerTest, SlotsOfARunAreDistinctAndUsedAgain) {
  const Exchange first = Begun(ledger_, 1);
  const Exchange second = Begun(ledger_, 1);
  EXPECT_EQ(first.slot, 0);
  EXPECT_EQ(second.slot, 1);
  EXPECT_TRUE(Receive(ledger_, TokenOf(ledger_, first)));
  EXPECT_EQ(Begun(ledger_, 1).slot, 0);
}

TEST_F(LedgerTest, MoreSendsThanSlotsAreAFault) {
  Begun(ledger_, 1);
  Begun(ledger_, 1);
  const Result<Exchange> result = ledger_.Begin(kSend, 1, 0);
  ASSERT_NE(FaultOf(result), nullptr);
  EXPECT_PRED_FORMAT2(IsSubstring, "at most 2 dispatch exchanges", FaultOf(result)->expected);
  EXPECT_EQ(FaultOf(result)->rank, kRank);
  EXPECT_EQ(FaultOf(result)->op, "dispatch_send");
}

TEST_F(LedgerTest, AReceivedExchangeHoldsItsSlotUntilItIsReleased) {
  Begun(ledger_, 1);
  const Token token = TokenOf(ledger_, Begun(ledger_, 1));
  const Result<Exchange> received = ledger_.Finish(kRecv, token.data());
  EXPECT_NE(FaultOf(ledger_.Begin(kSend, 1, 0)), nullptr);
  ledger_.Release(std::get<Exchange>(received));
  EXPECT_EQ(FaultOf(ledger_.Begin(kSend, 1, 0)), nullptr);
}

TEST_F(LedgerTest, RunsHaveSlotsOfTheirOwn) {
  Begun(ledger_, 1);
  Begun(ledger_, 1);
  EXPECT_EQ(Begun(ledger_, 2).slot, 0);
}

TEST_F(LedgerTest, KindsHaveSlotsOfTheirOwn) {
  constexpr Op kOtherSend = Op::kCombineSend;
  Begun(ledger_, 1);
  Begun(ledger_, 1);
  const Result<Exchange> other = ledger_.Begin(kOtherSend, 1, 0);
  ASSERT_EQ(FaultOf(other), nullptr);
  EXPECT_EQ(std::get<Exchange>(other).slot, 0);
  EXPECT_NE(FaultOf(ledger_.Begin(kSend, 1, 0)), nullptr);
}

TEST_F(LedgerTest, ReleaseFreesTheSlotOfItsOwnKind) {
  constexpr Op kOtherSend = Op::kCombineSend;
  Begun(ledger_, 1);
  Begun(ledger_, 1);
  const Result<Exchange> other = ledger_.Begin(kOtherSend, 1, 0);
  ledger_.Release(std::get<Exchange>(other));
  EXPECT_NE(FaultOf(ledger_.Begin(kSend, 1, 0)), nullptr);
}

TEST_F(LedgerTest, ARunThatHoldsAnExchangeOfAnyKindOutlivesIdleOnes) {
  for (const auto& [send, recv] : {std::pair{Op::kDispatchSend, Op::kDispatchRecv},
                                   std::pair{Op::kCombineSend, Op::kCombineRecv},
                                   std::pair{Op::kDispatchBackwardSend, Op::kDispatchBackwardRecv},
                                   std::pair{Op::kCombineBackwardSend, Op::kCombineBackwardRecv}}) {
    Ledger ledger(kBufferId, kRank, {.num_slots = 2});
    const Result<Exchange> held = ledger.Begin(send, -1, 0);
    const Token token = TokenOf(ledger, std::get<Exchange>(held));
    for (int run = 0; run < 3 * kMaxRuns; ++run) {
      ASSERT_TRUE(Receive(ledger, TokenOf(ledger, Begun(ledger, run))));
    }
    EXPECT_EQ(FaultOf(ledger.Finish(recv, token.data())), nullptr) << OpName(recv);
  }
}

TEST_F(LedgerTest, SixtyFourSlotsCanBeTaken) {
  Ledger ledger(kBufferId, kRank, {.num_slots = 64});
  for (int slot = 0; slot < 64; ++slot) EXPECT_EQ(Begun(ledger, 1).slot, slot);
  EXPECT_NE(FaultOf(ledger.Begin(kSend, 1, 0)), nullptr);
}

TEST_F(LedgerTest, ATokenUsedTwiceIsAFault) {
  const Token token = TokenOf(ledger_, Begun(ledger_, 1));
  EXPECT_TRUE(Receive(ledger_, token));
  EXPECT_PRED_FORMAT2(IsSubstring, "received before", SeenByRecv(ledger_, token));
}

TEST_F(LedgerTest, ATokenUsedTwiceBeforeTheReleaseIsAFault) {
  const Token token = TokenOf(ledger_, Begun(ledger_, 1));
  EXPECT_EQ(FaultOf(ledger_.Finish(kRecv, token.data())), nullptr);
  EXPECT_PRED_FORMAT2(IsSubstring, "received before", SeenByRecv(ledger_, token));
}

TEST_F(LedgerTest, AddedTokensAreRecognised) {
  for (const int uses : {2, 3, 4, 5, 7, 10}) {
    Token sum{};
    const Token token = TokenOf(ledger_, Begun(ledger_, uses));
    for (int use = 0; use < uses; ++use) {
      for (int i = 0; i < kTokenSize; ++i) sum[i] += token[i];
    }
    EXPECT_PRED_FORMAT2(IsSubstring, "sum of " + std::to_string(uses), SeenByRecv(ledger_, sum));
  }
}

TEST_F(LedgerTest, AnArrayThatIsNoTokenIsAFault) {
  for (const float value : {0.0F, 1.0F, -5439821.0F, 1e30F, std::numeric_limits<float>::infinity(),
                            std::numeric_limits<float>::quiet_NaN()}) {
    Token token;
    token.fill(value);
    EXPECT_EQ(SeenByRecv(ledger_, token), "an array that no send returned") << value;
  }
}

TEST_F(LedgerTest, ATokenOfAnotherKindIsAFault) {
  const Token token = TokenOf(ledger_, Begun(ledger_, 1));
  EXPECT_EQ(SeenByRecv(ledger_, token, kOtherRecv), "a dispatch token");
  EXPECT_TRUE(Receive(ledger_, token));
}

// The key of the round that an op takes.
ExchangeKey KeyOf(const Result<Exchange>& result) {
  EXPECT_EQ(FaultOf(result), nullptr);
  return FaultOf(result) == nullptr ? std::get<Exchange>(result).key : ExchangeKey{};
}

TEST(LedgerOfTwoTiersTest, AnExchangeIsForwardedOnceBeforeItIsReceived) {
  Ledger ledger(kBufferId, kRank, {.ep_size = 8, .num_slots = 2, .num_nodes = 2, .node_stride = 4});
  const Exchange sent = Begun(ledger, 1, 7);
  const Token token = TokenOf(ledger, sent);
  EXPECT_EQ(SeenByRecv(ledger, token), "exchange 1, which was sent and not forwarded");
  EXPECT_EQ(KeyOf(ledger.Forward(Op::kDispatchForward, token.data())),
            (ExchangeKey{.run = 1, .call_site = 7, .count = 0, .hop = Hop::kRail}));
  const Result<Exchange> again = ledger.Forward(Op::kDispatchForward, token.data());
  ASSERT_NE(FaultOf(again), nullptr);
  EXPECT_EQ(FaultOf(again)->seen, "a second one of exchange 1");
  EXPECT_EQ(KeyOf(ledger.Finish(kRecv, token.data())),
            (ExchangeKey{.run = 1, .call_site = 7, .count = 0, .hop = Hop::kSpread}));
  const Result<Exchange> late = ledger.Forward(Op::kDispatchForward, token.data());
  ASSERT_NE(FaultOf(late), nullptr);
  EXPECT_EQ(FaultOf(late)->seen, "exchange 1, received before");
}

TEST_F(LedgerTest, ATokenOfAnotherRankIsAFault) {
  Ledger other(kBufferId, kRank + 1, {.num_slots = 2});
  const Token token = TokenOf(other, Begun(other, 1));
  EXPECT_EQ(SeenByRecv(ledger_, token), "one of buffer 6, rank 4");
}

TEST_F(LedgerTest, ATokenOfAnotherBufferIsAFault) {
  Ledger other(kBufferId + 1, kRank, {.num_slots = 2});
  const Token token = TokenOf(other, Begun(other, 1));
  EXPECT_EQ(SeenByRecv(ledger_, token), "one of buffer 7, rank 3");
}

TEST_F(LedgerTest, TokensCarrySequenceNumbersPastTwoToThe24Exactly) {
  for (const int64_t sequence :
       {(int64_t{1} << 24) - 1, int64_t{1} << 24, (int64_t{1} << 24) + 1, (int64_t{5} << 40) + 3}) {
    const Token token = TokenOf(ledger_, {.sequence = sequence, .key = {}});
    EXPECT_PRED_FORMAT2(IsSubstring, "exchange " + std::to_string(sequence) + ",",
                        SeenByRecv(ledger_, token));
  }
}

TEST_F(LedgerTest, TokensConsistOfExactIntegers) {
  const Token token = TokenOf(ledger_, {.sequence = (int64_t{7} << 40) + 12345, .key = {}});
  for (const float word : token) {
    EXPECT_LE(word, 0x1p24F);
    EXPECT_EQ(word, static_cast<float>(static_cast<int32_t>(word)));
  }
}

TEST_F(LedgerTest, BufferIdsPastTwoToThe24Work) {
  Ledger ledger((int64_t{3} << 24) + 5, kRank, {.num_slots = 2});
  EXPECT_TRUE(Receive(ledger, TokenOf(ledger, Begun(ledger, 1))));
}

TEST_F(LedgerTest, FinishedRunsAreForgotten) {
  for (int run = 0; run < 10 * kMaxRuns; ++run) {
    ASSERT_TRUE(Receive(ledger_, TokenOf(ledger_, Begun(ledger_, run))));
  }
}

TEST_F(LedgerTest, TooManyRunsThatLostATokenAreAFault) {
  for (int run = 0; run < kMaxRuns; ++run) Begun(ledger_, run);
  const Result<Exchange> result = ledger_.Begin(kSend, kMaxRuns, 0);
  ASSERT_NE(FaultOf(result), nullptr);
  EXPECT_PRED_FORMAT2(IsSubstring, "64 earlier runs", FaultOf(result)->seen);
}

TEST_F(LedgerTest, WorksAgainAfterTooManyRunsLostATokenInThem) {
  for (int run = 0; run < kMaxRuns; ++run) Begun(ledger_, run);
  EXPECT_NE(FaultOf(ledger_.Begin(kSend, kMaxRuns, 0)), nullptr);
  EXPECT_TRUE(Receive(ledger_, TokenOf(ledger_, Begun(ledger_, kMaxRuns + 1))));
}

TEST_F(LedgerTest, NamesTheRunsItHasGivenUpOnce) {
  std::vector<int64_t> runs;
  for (int run = 0; run < kMaxRuns; ++run) {
    Begun(ledger_, run);
    runs.push_back(run);
  }
  EXPECT_TRUE(ledger_.TakeLostRuns().empty());
  EXPECT_NE(FaultOf(ledger_.Begin(kSend, kMaxRuns, 0)), nullptr);
  EXPECT_EQ(ledger_.TakeLostRuns(), runs);
  EXPECT_TRUE(ledger_.TakeLostRuns().empty());
}

TEST_F(LedgerTest, FailedRunsAreForgottenWithWhatTheyHold) {
  for (int run = 0; run < 10 * kMaxRuns; ++run) {
    Begun(ledger_, run);
    ledger_.MarkFailed(run);
  }
}

TEST_F(LedgerTest, ReleaseAfterItsRunIsForgottenIsHarmless) {
  const Exchange lost = Begun(ledger_, -1);
  ledger_.MarkFailed(-1);
  for (int run = 0; run < kMaxRuns; ++run) Begun(ledger_, run);
  ledger_.Release(lost);
  EXPECT_EQ(Begun(ledger_, 0).slot, 1);
}

TEST_F(LedgerTest, ReleaseTwiceFreesTheSlotOnce) {
  const Exchange first = Begun(ledger_, 1);
  ledger_.Release(first);
  const Exchange second = Begun(ledger_, 1);
  ASSERT_EQ(second.slot, first.slot);
  ledger_.Release(first);
  EXPECT_EQ(Begun(ledger_, 1).slot, 1);
}

TEST_F(LedgerTest, ThreadsMayWorkOnTheirOwnRuns) {
  std::vector<std::thread> threads;
  for (int64_t run = 0; run < 4; ++run) {
    threads.emplace_back([this, run] {
      for (int i = 0; i < 500; ++i) {
        const Token a = TokenOf(ledger_, Begun(ledger_, run, 1));
        const Token b = TokenOf(ledger_, Begun(ledger_, run, 2));
        EXPECT_TRUE(Receive(ledger_, b));
        EXPECT_TRUE(Receive(ledger_, a));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(ExchangeTest, DescribeNamesKindSequenceAndSlot) {
  const Exchange exchange{.sequence = 12, .slot = 1, .kind = Kind::kCombineBackward, .key = {}};
  EXPECT_EQ(exchange.Describe(), "combine_backward exchange 12, slot 1");
}

TEST(ExchangeKeyHashTest, SmallKeysDoNotCollide) {
  std::unordered_set<size_t> hashes;
  for (int64_t run = 0; run < 20; ++run) {
    for (int64_t site = 0; site < 20; ++site) {
      for (int64_t count = 0; count < 20; ++count) {
        hashes.insert(ExchangeKeyHash()({.run = run, .call_site = site, .count = count}));
      }
    }
  }
  EXPECT_EQ(hashes.size(), 20U * 20 * 20);
}

}  // namespace
}  // namespace jax_sm_free
