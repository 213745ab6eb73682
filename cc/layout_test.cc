#include "cc/layout.h"

#include <algorithm>
#include <array>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

constexpr std::array kKinds{Kind::kDispatch, Kind::kCombine, Kind::kDispatchBackward,
                            Kind::kCombineBackward};

// 2 local experts, top 3, rows of 10 bytes.
constexpr Config kSmall{
    .ep_size = 4, .num_experts = 8, .top_k = 3, .max_tokens = 5, .row_bytes = 10};

MessageHeader Header(Kind kind, int32_t num_rows, int64_t row_bytes) {
  return {.kind = static_cast<int32_t>(kind), .num_rows = num_rows, .row_bytes = row_bytes};
}

std::vector<int64_t> Offsets(const MessageLayout& layout) {
  return {layout.rows_per_expert, layout.local_expert, layout.position, layout.weight,
          layout.number,          layout.rows,         layout.total};
}

TEST(LayoutTest, DispatchHasEveryPart) {
  const MessageLayout layout = LayoutOf(kSmall, Header(Kind::kDispatch, 5, 10));
  EXPECT_EQ(Offsets(layout), (std::vector<int64_t>{64, 128, 192, 256, 320, 320, 448}));
}

TEST(LayoutTest, CommonRowsAddTheNumbersOfAllRows) {
  MessageHeader header = Header(Kind::kDispatch, 5, 10);
  header.num_common = 2;
  const MessageLayout layout = LayoutOf(kSmall, header);
  EXPECT_EQ(Offsets(layout), (std::vector<int64_t>{64, 128, 192, 256, 320, 384, 512}));
}

TEST(LayoutTest, CombineHasRowsAlone) {
  const MessageLayout layout = LayoutOf(kSmall, Header(Kind::kCombine, 5, 10));
  EXPECT_EQ(layout.rows, 64);
  EXPECT_EQ(layout.total, 192);
}

TEST(LayoutTest, DispatchBackwardHasWeightsAndRows) {
  const MessageLayout layout = LayoutOf(kSmall, Header(Kind::kDispatchBackward, 5, 10));
  EXPECT_EQ(layout.weight, 64);
  EXPECT_EQ(layout.rows, 128);
  EXPECT_EQ(layout.total, 256);
}

TEST(LayoutTest, CombineBackwardHasRowsAlone) {
  const MessageLayout layout = LayoutOf(kSmall, Header(Kind::kCombineBackward, 5, 10));
  EXPECT_EQ(layout.rows, 64);
  EXPECT_EQ(layout.total, 192);
}

TEST(LayoutTest, RowsStartOnBoundariesOfSixteenBytes) {
  EXPECT_EQ(LayoutOf(kSmall, Header(Kind::kCombine, 5, 10)).row_stride, 16);
  EXPECT_EQ(LayoutOf(kSmall, Header(Kind::kCombine, 5, 16)).row_stride, 16);
  EXPECT_EQ(LayoutOf(kSmall, Header(Kind::kCombine, 5, 17)).row_stride, 32);
}

TEST(LayoutTest, MessageWithoutRowsKeepsHeaderAndCounts) {
  EXPECT_EQ(LayoutOf(kSmall, Header(Kind::kDispatch, 0, 10)).total, 128);
  EXPECT_EQ(LayoutOf(kSmall, Header(Kind::kCombine, 0, 10)).total, 64);
}

TEST(LayoutTest, PartsOfAnySizeAreAlignedAndDoNotOverlap) {
  std::mt19937 random(1);
  const auto below = [&](int32_t n) { return static_cast<int32_t>(random() % n); };
  for (int i = 0; i < 1000; ++i) {
    const int32_t ep_size = 1 + below(8);
    const int32_t num_local = 1 + below(40);
    const Config config{
        .ep_size = ep_size, .num_experts = ep_size * num_local, .top_k = 1 + below(32)};
    MessageHeader header = Header(kKinds[below(4)], below(300), below(5000));
    header.num_common = below(header.num_rows + 1);
    const MessageLayout layout = LayoutOf(config, header);

    for (const int64_t offset : Offsets(layout)) EXPECT_EQ(offset % kPartAlignment, 0);
    const bool routed = header.kind == static_cast<int32_t>(Kind::kDispatch);
    const bool weighted = routed || header.kind == static_cast<int32_t>(Kind::kDispatchBackward);
    const int64_t entry_bytes = int64_t{header.num_rows} * config.top_k * 4;
    EXPECT_GE(layout.rows_per_expert, static_cast<int64_t>(sizeof(MessageHeader)));
    EXPECT_GE(layout.local_expert - layout.rows_per_expert, routed ? num_local * 4 : 0);
    EXPECT_GE(layout.position - layout.local_expert, routed ? entry_bytes : 0);
    EXPECT_GE(layout.weight - layout.position, routed ? entry_bytes : 0);
    EXPECT_GE(layout.number - layout.weight, weighted ? entry_bytes : 0);
    EXPECT_GE(layout.rows - layout.number, header.num_common > 0 ? header.num_rows * 4 : 0);
    EXPECT_GE(layout.row_stride, header.row_bytes);
    EXPECT_GE(layout.total - layout.rows, header.num_rows * layout.row_stride);
  }
}

TEST(LayoutTest, SizesPastTwoGigabytesDoNotOverflow) {
  const Config config{.num_experts = 256, .top_k = 1024};
  constexpr int32_t kNumRows = 1 << 20;
  const MessageLayout layout = LayoutOf(config, Header(Kind::kDispatch, kNumRows, 1 << 14));
  EXPECT_EQ(layout.position - layout.local_expert, int64_t{1} << 32);
  EXPECT_EQ(layout.total - layout.rows, int64_t{1} << 34);
}

TEST(LayoutTest, MaxMessageBytesIsThatOfTheLargestMessage) {
  for (const int32_t max_tokens : {0, 1, 7, 64}) {
    Config config = kSmall;
    config.max_tokens = max_tokens;
    int64_t largest = 0;
    for (const Kind kind : kKinds) {
      for (int32_t num_rows = 0; num_rows <= max_tokens; ++num_rows) {
        for (int64_t row_bytes = 0; row_bytes <= config.row_bytes; ++row_bytes) {
          MessageHeader header = Header(kind, num_rows, row_bytes);
          largest = std::max(largest, LayoutOf(config, header).total);
          if (kind != Kind::kDispatch) continue;
          header.num_common = num_rows;
          largest = std::max(largest, LayoutOf(config, header).total);
        }
      }
    }
    EXPECT_EQ(MaxMessageBytes(config), largest) << max_tokens << " tokens";
  }
}

TEST(LayoutTest, KindsHaveNames) {
  EXPECT_STREQ(KindName(Kind::kDispatch), "dispatch");
  EXPECT_STREQ(KindName(Kind::kCombine), "combine");
  EXPECT_STREQ(KindName(Kind::kDispatchBackward), "dispatch_backward");
  EXPECT_STREQ(KindName(Kind::kCombineBackward), "combine_backward");
}

}  // namespace
}  // namespace jax_sm_free
