#include <cfenv>
#include <chrono>
#include <cstddef>
#include <future>
#include <latch>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "cc/cpu/ops.h"
#include "cc/cpu/ops_testing.h"
#include "cc/cpu/testing.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using testing::BufferOf;
using testing::CallOf;
using testing::ConfigFor;
using testing::Describe;
using ::testing::IsSubstring;
using testing::kMatrix;
using testing::Layer;
using testing::OnEveryRank;
using testing::Random;
using testing::RandomSource;
using testing::Received;
using testing::Source;
using testing::SourcesOf;
using testing::Token;

std::string SeenBy(const std::optional<Fault>& fault) { return fault ? fault->seen : "no fault"; }

class FaultsTest : public ::testing::Test {
 protected:
  static constexpr int32_t kEpSize = 4;

  // Sends and receives a dispatch on every rank, and returns what each rank saw.
  std::vector<std::string> Dispatch(const std::vector<Source>& sources, int64_t run) {
    std::vector<std::string> seen(kEpSize);
    OnEveryRank(kEpSize, [&](int32_t rank) {
      Layer layer(buffer_, rank, run, 0);
      std::optional<Fault> fault = layer.SendDispatch(sources[rank]);
      if (!fault) fault = layer.ReceiveDispatch();
      seen[rank] = SeenBy(fault);
    });
    return seen;
  }

  void ExpectThatARunWorks(int64_t run) {
    const std::vector<Source> sources = SourcesOf(config_, run);
    EXPECT_EQ(Dispatch(sources, run), std::vector<std::string>(kEpSize, "no fault"));
  }

  Config config_ = ConfigFor(kEpSize);
  std::shared_ptr<HostBuffer> buffer_ = BufferOf(config_);
};

TEST_F(FaultsTest, AnIndexOutOfRangeEndsAllRanksAndTheNextRunWorks) {
  for (int64_t run = 0; run < 20; run += 2) {
    std::vector<Source> sources = SourcesOf(config_, run);
    Random random(run);
    sources[1] = RandomSource(config_, 5, 0, 0, random);
    sources[1].values = std::vector<std::byte>(5 * kMatrix.row_bytes());
    sources[1].values_bytes = kMatrix.row_bytes();
    sources[1].idx[4] = config_.num_experts;
    EXPECT_EQ(Dispatch(sources, run), std::vector<std::string>(kEpSize, "8 at token 1, k 1"));
    const std::string kept = buffer_->TakeFault().value_or("");
    EXPECT_PRED_FORMAT2(IsSubstring, "dispatch_send on rank 1: expected topk_idx in [-1, 8)", kept);
    ExpectThatARunWorks(run + 1);
    EXPECT_EQ(buffer_->TakeFault(), std::nullopt);
  }
}

TEST_F(FaultsTest, ATokenUsedTwiceEndsTheRun) {
  const std::vector<Source> sources = SourcesOf(config_, 1);
  Layer layer(buffer_, 0, 1, 0);
  std::vector<std::unique_ptr<Layer>> others;
  for (int32_t rank = 1; rank < kEpSize; ++rank) {
    others.push_back(std::make_unique<Layer>(buffer_, rank, 1, 0));
    EXPECT_EQ(Describe(others.back()->SendDispatch(sources[rank])), "");
  }
  EXPECT_EQ(Describe(layer.SendDispatch(sources[0])), "");
  EXPECT_EQ(Describe(layer.ReceiveDispatch()), "");
  EXPECT_PRED_FORMAT2(IsSubstring, "received before", SeenBy(layer.ReceiveDispatch()));
  EXPECT_PRED_FORMAT2(IsSubstring, "received before", SeenBy(others[0]->ReceiveDispatch()));
  ExpectThatARunWorks(2);
}

TEST_F(FaultsTest, MoreSendsThanSlotsEndTheRun) {
  const std::vector<Source> sources = SourcesOf(config_, 1);
  Layer layer(buffer_, 0, 1, 0);
  for (int32_t i = 0; i < config_.num_slots; ++i) {
    EXPECT_EQ(Describe(layer.SendDispatch(sources[0])), "");
  }
  EXPECT_PRED_FORMAT2(IsSubstring, "one send more without a recv",
                      SeenBy(layer.SendDispatch(sources[0])));
  ExpectThatARunWorks(2);
}

TEST_F(FaultsTest, RunsThatLostATokenGiveTheirMessagesBack) {
  const std::vector<Source> sources = SourcesOf(config_, 1);
  const auto lose_tokens = [&](int64_t first_run) {
    int64_t run = first_run;
    while (!Layer(buffer_, 0, run, 0).SendDispatch(sources[0])) ++run;
    return run;
  };
  const int64_t last_run = lose_tokens(0);
  const int64_t bytes = buffer_->MessageBytes(0);
  lose_tokens(last_run + 1);
  EXPECT_EQ(buffer_->MessageBytes(0), bytes);
}

TEST_F(FaultsTest, ADeviceAtAnotherPlaceOfTheMeshIsAFault) {
  const Source source = SourcesOf(config_, 1)[0];
  Token token{};
  const int32_t position = 2;
  const auto fault = DispatchSend(CallOf(Op::kDispatchSend, buffer_, 0, 1),
                                  {&position, source.topk(), source.rows()}, token.data());
  EXPECT_EQ(SeenBy(fault), "position 2");
}

TEST_F(FaultsTest, ALayoutOfOtherRowsIsAFault) {
  const std::vector<int32_t> rows(config_.max_recv_tokens(), 99);
  const std::vector<int32_t> num_rows_from(kEpSize, 1);
  Token token{};
  const ExpertRows y{.layout = {rows.data(), num_rows_from.data(), 1, 99}};
  const auto fault = SendSums(CallOf(Op::kCombineSend, buffer_, 0, 1),
                              {.matrix = kMatrix, .rows = y}, token.data());
  EXPECT_EQ(SeenBy(fault), "99");
}

TEST_F(FaultsTest, ARankThatNeverSendsIsNamedByTheOthers) {
  config_.timeout_s = 0.1;
  buffer_ = BufferOf(config_);
  const std::vector<Source> sources = SourcesOf(config_, 1);
  std::latch all_sent(kEpSize - 1);
  OnEveryRank(kEpSize, [&](int32_t rank) {
    if (rank == 2) return;
    Layer layer(buffer_, rank, 1, 0);
    EXPECT_EQ(Describe(layer.SendDispatch(sources[rank])), "");
    all_sent.arrive_and_wait();  // so that the timeout does not end before a slow thread has sent
    EXPECT_PRED_FORMAT2(IsSubstring, "none from rank 2", SeenBy(layer.ReceiveDispatch()));
  });
  Layer late(buffer_, 2, 1, 0);
  EXPECT_PRED_FORMAT2(IsSubstring, "none from rank 2", SeenBy(late.SendDispatch(sources[2])));
}

TEST_F(FaultsTest, CloseEndsWhatWaits) {
  const std::vector<Source> sources = SourcesOf(config_, 1);
  Layer layer(buffer_, 0, 1, 0);
  EXPECT_EQ(Describe(layer.SendDispatch(sources[0])), "");
  std::thread closer([this] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    buffer_->Close();
  });
  EXPECT_EQ(SeenBy(layer.ReceiveDispatch()), "it was closed");
  closer.join();
}

TEST_F(FaultsTest, AFaultOfUnpackingEndsTheRun) {
  const std::vector<Source> sources = SourcesOf(config_, 1);
  Token token{};
  for (int32_t rank = 0; rank < kEpSize; ++rank) {
    const DispatchSendIn in{&rank, sources[rank].topk(), sources[rank].rows()};
    EXPECT_EQ(Describe(DispatchSend(CallOf(Op::kDispatchSend, buffer_, rank, 1), in, token.data())),
              "");
  }
  const auto fault =
      Received(CallOf(Op::kDispatchRecv, buffer_, kEpSize - 1, 1), token,
               [](const Config&, const auto&) -> std::optional<Fault> {
                 return Fault{.peer = 1, .expected = "", .seen = "a mismatch", .exchange = {}};
               });
  ASSERT_TRUE(fault.has_value());
  EXPECT_EQ(fault->op, "dispatch_recv");
  EXPECT_EQ(fault->rank, kEpSize - 1);
  EXPECT_EQ(fault->peer, 1);
  Layer late(buffer_, 0, 1, 0);
  EXPECT_EQ(SeenBy(late.SendDispatch(sources[0])), "a mismatch");
}

TEST_F(FaultsTest, TheFloatModeOfTheReceiverHoldsWhereItsProgramGoesOn) {
  const std::vector<Source> sources = SourcesOf(config_, 1);
  Token token{};
  const int32_t position = 0;
  EXPECT_EQ(Describe(DispatchSend(CallOf(Op::kDispatchSend, buffer_, 0, 1),
                                  {&position, sources[0].topk(), sources[0].rows()}, token.data())),
            "");
  std::promise<int> rounding;
  HostCall recv = CallOf(Op::kDispatchRecv, buffer_, 0, 1);
  recv.done = [&rounding](const auto&) { rounding.set_value(std::fegetround()); };
  ASSERT_EQ(std::fesetround(FE_UPWARD), 0);
  Receive(recv, token.data(), [](const Config&, const auto&) { return std::optional<Fault>(); });
  std::fesetround(FE_TONEAREST);
  for (int32_t rank = 1; rank < kEpSize; ++rank) {
    Layer other(buffer_, rank, 1, 0);
    EXPECT_EQ(Describe(other.SendDispatch(sources[rank])), "");
  }
  EXPECT_EQ(rounding.get_future().get(), FE_UPWARD);
}

}  // namespace
}  // namespace jax_sm_free
