#include "cc/cuda/host/courier.h"

#include <cstdint>
#include <cstring>
#include <memory>
#include <set>
#include <utility>
#include <variant>
#include <vector>

#include "cc/cuda/host/courier_testing.h"
#include "gtest/gtest.h"

namespace jax_sm_free::cuda {
namespace {

// Rank 1 of four, which does not reach ranks 2 and 3.
class CourierTest : public ::testing::Test {
 protected:
  CourierTest() {
    view_ = ViewOf(kConfig, 1);
    for (int32_t rank = 0; rank < kConfig.ep_size; ++rank) {
      view_.base[rank] = courier_->OutboxOf(rank);
    }
    view_.base[view_.rank] = own_.data();
    for (size_t i = 0; i < own_.size(); ++i) own_[i] = static_cast<std::byte>(i * 31 % 251);
  }

  std::shared_ptr<Courier> MakeCourier() {
    auto made = Courier::Make(std::make_unique<FakeRegions>(&network_, std::set{2, 3}), kConfig);
    return std::get<std::shared_ptr<Courier>>(std::move(made));
  }

  // Where a message for `dst` is packed.
  int64_t StageOf(int32_t dst, int32_t slot) const {
    return StageOffset(view_, slot, view_.messages.end[dst].stage);
  }
  int64_t Entry(int32_t slot) const { return slot * kConfig.ep_size + view_.rank; }
  int64_t MessageAt(int32_t slot) const {
    return view_.regions.recv + Entry(slot) * view_.regions.message_bytes;
  }
  int64_t SignalAt(int32_t slot) const { return view_.regions.signals + Entry(slot) * 8; }
  int64_t AckAt(int32_t slot) const { return view_.regions.acks + Entry(slot) * 8; }
  int64_t NoticedAt(int32_t slot) const { return view_.regions.noticed + Entry(slot) * 8; }
  int64_t NoticeAt(int32_t slot) const {
    return view_.regions.notices + Entry(slot) * view_.regions.notice_bytes;
  }

  // What kernels do.
  void WriteWord(int32_t dst, int64_t offset, uint64_t value) {
    std::memcpy(view_.base[dst] + offset, &value, sizeof(value));
  }
  void WriteNotice(int32_t dst, int32_t slot, uint8_t content) {
    std::memset(view_.base[dst] + NoticeAt(slot), content, view_.regions.notice_bytes);
  }

  // Whether bytes [begin, end) of the message in the region of `dst` are those from `source` on in
  // the own region.
  bool HasCome(int32_t dst, int32_t slot, int64_t begin, int64_t end, int64_t source) {
    return std::memcmp(network_.At(dst, MessageAt(slot) + begin), own_.data() + source,
                       end - begin) == 0;
  }

  std::vector<Call> TakeCalls() { return std::exchange(network_.calls, {}); }

  Network network_{kConfig};
  Bytes own_ = Bytes(RegionsOf(kConfig).total);
  std::shared_ptr<Courier> courier_ = MakeCourier();
  RankView view_{};
};

TEST_F(CourierTest, RanksOutOfReachAloneHaveOutboxes) {
  for (const int32_t rank : {0, 1}) {
    EXPECT_FALSE(courier_->Serves(rank));
    EXPECT_EQ(courier_->OutboxOf(rank), nullptr);
  }
  EXPECT_TRUE(courier_->Serves(2));
  EXPECT_TRUE(courier_->Serves(3));
  EXPECT_NE(courier_->OutboxOf(2), courier_->OutboxOf(3));
  ASSERT_EQ(network_.outboxes.size(), 2U);
  // An outbox is as long as all that lies before the messages.
  EXPECT_EQ(network_.outboxes[0]->size(), static_cast<size_t>(view_.regions.recv));
}

TEST_F(CourierTest, ReturnsTheFaultOfAnOutbox) {
  Network network(kConfig);
  network.most_outboxes = 1;
  const auto made = Courier::Make(std::make_unique<FakeRegions>(&network, std::set{2, 3}), kConfig);
  ASSERT_NE(FaultOf(made), nullptr);
  EXPECT_EQ(FaultOf(made)->seen, "none");
}

TEST_F(CourierTest, AMessageGoesAheadOfItsSignal) {
  const int32_t slot = 2;
  const int64_t stage = StageOf(3, slot);
  courier_->Send(view_, {.message = 3,
                         .slot = slot,
                         .begin = 0,
                         .end = 320,
                         .common = 320,
                         .common_at = stage + 320,
                         .signal = 17});
  EXPECT_EQ(TakeCalls(), (std::vector<Call>{{Call::kPut, 3, MessageAt(slot), 320},
                                            {Call::kSignal, 3, SignalAt(slot), 0, 17}}));
  EXPECT_TRUE(HasCome(3, slot, 0, 320, stage));
  EXPECT_EQ(network_.WordAt(3, SignalAt(slot)), 17U);
}

TEST_F(CourierTest, ALaterPartGoesBehindTheFirst) {
  const int64_t stage = StageOf(2, 0);
  for (const int64_t begin : {0, 128}) {
    courier_->Send(view_, {.message = 2,
                           .slot = 0,
                           .begin = begin,
                           .end = begin + 128,
                           .common = begin + 128,
                           .common_at = stage + begin + 128,
                           .signal = SignalOf(5, begin == 0 ? 0 : kLastPart)});
  }
  EXPECT_EQ(TakeCalls(),
            (std::vector<Call>{{Call::kPut, 2, MessageAt(0), 128},
                               {Call::kSignal, 2, SignalAt(0), 0, SignalOf(5, 0)},
                               {Call::kPut, 2, MessageAt(0) + 128, 128},
                               {Call::kSignal, 2, SignalAt(0), 0, SignalOf(5, kLastPart)}}));
  EXPECT_TRUE(HasCome(2, 0, 0, 256, stage));
}

TEST_F(CourierTest, CommonRowsAreASecondPieceAheadOfTheSignal) {
  const int32_t slot = 1;
  const int64_t stage = StageOf(3, slot);
  const int64_t common_at = StageOf(2, slot) + 64;
  courier_->Send(view_, {.message = 3,
                         .slot = slot,
                         .begin = 0,
                         .end = 400,
                         .common = 256,
                         .common_at = common_at,
                         .signal = 9});
  EXPECT_EQ(TakeCalls(), (std::vector<Call>{{Call::kPut, 3, MessageAt(slot), 256},
                                            {Call::kPut, 3, MessageAt(slot) + 256, 144},
                                            {Call::kSignal, 3, SignalAt(slot), 0, 9}}));
  EXPECT_TRUE(HasCome(3, slot, 0, 256, stage));
  EXPECT_TRUE(HasCome(3, slot, 256, 400, common_at));
}

TEST_F(CourierTest, AMessageOfCommonRowsAloneIsOnePiece) {
  const int64_t common_at = StageOf(2, 0) + 64;
  courier_->Send(view_, {.message = 3,
                         .slot = 0,
                         .begin = 128,
                         .end = 256,
                         .common = 128,
                         .common_at = common_at,
                         .signal = 3});
  EXPECT_EQ(TakeCalls(), (std::vector<Call>{{Call::kPut, 3, MessageAt(0) + 128, 128},
                                            {Call::kSignal, 3, SignalAt(0), 0, 3}}));
  EXPECT_TRUE(HasCome(3, 0, 128, 256, common_at));
}

TEST_F(CourierTest, NothingNewIsNothingSent) {
  EXPECT_FALSE(courier_->Forward(view_));
  EXPECT_TRUE(network_.calls.empty());
}

TEST_F(CourierTest, ANoticeGoesAheadOfItsSignalAndOnce) {
  WriteNotice(2, 1, 0x5a);
  EXPECT_FALSE(courier_->Forward(view_));  // The kernel has not said yet that it is there.
  WriteWord(2, NoticedAt(1), 7);
  EXPECT_TRUE(courier_->Forward(view_));
  EXPECT_EQ(TakeCalls(),
            (std::vector<Call>{{Call::kPutAndWait, 2, NoticeAt(1), view_.regions.notice_bytes},
                               {Call::kSignal, 2, NoticedAt(1), 0, 7}}));
  EXPECT_EQ(*network_.At(2, NoticeAt(1)), std::byte{0x5a});
  EXPECT_EQ(network_.WordAt(2, NoticedAt(1)), 7U);
  EXPECT_FALSE(courier_->Forward(view_));
  EXPECT_TRUE(network_.calls.empty());
}

TEST_F(CourierTest, TheNextNoticeOfASlotIsSentToo) {
  for (const uint8_t number : {1, 2, 3}) {
    WriteNotice(3, 0, number);
    WriteWord(3, NoticedAt(0), number);
    EXPECT_TRUE(courier_->Forward(view_));
    WriteNotice(3, 0, 0xff);  // The outbox is free as soon as Forward returns.
    EXPECT_EQ(*network_.At(3, NoticeAt(0)), std::byte{number});
    EXPECT_EQ(network_.WordAt(3, NoticedAt(0)), number);
  }
}

TEST_F(CourierTest, AnAcknowledgementIsSentOnce) {
  WriteWord(3, AckAt(2), 11);
  EXPECT_TRUE(courier_->Forward(view_));
  EXPECT_FALSE(courier_->Forward(view_));
  EXPECT_EQ(TakeCalls(), (std::vector<Call>{{Call::kSignal, 3, AckAt(2), 0, 11}}));
  EXPECT_EQ(network_.WordAt(3, AckAt(2)), 11U);
}

TEST_F(CourierTest, RanksAndSlotsDoNotMix) {
  for (const int32_t dst : {2, 3}) {
    for (int32_t slot = 0; slot < kConfig.num_slots; ++slot) {
      WriteNotice(dst, slot, static_cast<uint8_t>(16 * dst + slot));
      WriteWord(dst, NoticedAt(slot), 100 * dst + slot);
      WriteWord(dst, AckAt(slot), 200 * dst + slot);
    }
  }
  EXPECT_TRUE(courier_->Forward(view_));
  EXPECT_FALSE(courier_->Forward(view_));
  for (const int32_t dst : {2, 3}) {
    for (int32_t slot = 0; slot < kConfig.num_slots; ++slot) {
      EXPECT_EQ(*network_.At(dst, NoticeAt(slot)), static_cast<std::byte>(16 * dst + slot));
      EXPECT_EQ(network_.WordAt(dst, NoticedAt(slot)), static_cast<uint64_t>(100 * dst + slot));
      EXPECT_EQ(network_.WordAt(dst, AckAt(slot)), static_cast<uint64_t>(200 * dst + slot));
    }
  }
  // For each rank and slot: a notice, its signal, an acknowledgement.
  EXPECT_EQ(network_.calls.size(), 2U * kConfig.num_slots * 3U);
}

TEST_F(CourierTest, RanksWithinReachGetNothing) {
  WriteWord(2, NoticedAt(0), 4);
  WriteWord(3, AckAt(0), 4);
  EXPECT_TRUE(courier_->Forward(view_));
  for (const Call& call : TakeCalls()) EXPECT_TRUE(courier_->Serves(call.rank));
}

}  // namespace
}  // namespace jax_sm_free::cuda
