#include "cc/cuda/device_state.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace jax_sm_free::cuda {
namespace {

constexpr int64_t kRowBytes = 14336;

constexpr Config MakeConfig(int32_t ep_size, int32_t max_tokens) {
  return {.ep_size = ep_size,
          .num_experts = 64 * ep_size,
          .top_k = 8,
          .max_tokens = max_tokens,
          .num_slots = 3,
          .row_bytes = kRowBytes};
}

TEST(DeviceStateTest, RegionsLieBehindEachOther) {
  for (const int32_t ep_size : {1, 2, 4, 32}) {
    const RegionLayout regions = RegionsOf(MakeConfig(ep_size, 4096));
    const int64_t num_messages = 3 * ep_size;
    const std::vector<std::pair<int64_t, int64_t>> parts = {
        {regions.signals, num_messages * 8},
        {regions.acks, num_messages * 8},
        {regions.noticed, num_messages * 8},
        {regions.posted, num_messages * 8},
        {regions.notices, num_messages * regions.notice_bytes},
        {regions.recv, num_messages * regions.message_bytes},
        {regions.stage, (num_messages - 3) * regions.message_bytes},
        {regions.total, 0}};
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      EXPECT_GE(parts[i + 1].first, parts[i].first + parts[i].second) << ep_size << ", part " << i;
    }
  }
}

TEST(DeviceStateTest, EachMessageHasAStageOfItsOwn) {
  RankView view{};
  view.config = MakeConfig(4, 4096);
  view.regions = RegionsOf(view.config);
  for (int32_t src = 0; src < 4; ++src) {
    std::vector<int64_t> offsets;
    for (int32_t slot = 0; slot < 3; ++slot) {
      for (int32_t dst = 0; dst < 4; ++dst) {
        if (dst != src) offsets.push_back(StageOffset(view, slot, src, dst));
      }
    }
    std::sort(offsets.begin(), offsets.end());
    EXPECT_EQ(offsets.front(), view.regions.stage);
    for (size_t i = 1; i < offsets.size(); ++i) {
      EXPECT_EQ(offsets[i] - offsets[i - 1], view.regions.message_bytes);
    }
    EXPECT_EQ(offsets.back() + view.regions.message_bytes, view.regions.total);
  }
}

TEST(DeviceStateTest, SmallExchangesLeaveWhole) {
  const Config config = MakeConfig(4, 4096);
  const auto most = static_cast<int32_t>(((int64_t{4} << 20) - 1) / kRowBytes);
  for (const int32_t rows : {0, 1, 128, most}) {
    EXPECT_EQ(FirstPartTokens(config, rows, kRowBytes), 0) << rows;
    EXPECT_EQ(FirstPartRows(rows, kRowBytes), 0) << rows;
  }
  EXPECT_GT(FirstPartTokens(config, most + 1, kRowBytes), 0);
  EXPECT_GT(FirstPartRows(most + 1, kRowBytes), 0);
}

TEST(DeviceStateTest, TheFirstPartIsHalfOfTheTokensInWholeTiles) {
  const Config config = MakeConfig(4, 4096);
  const int32_t tile = TileTokens(config);
  for (int64_t tokens = 293; tokens <= 4096; ++tokens) {
    const int64_t first = FirstPartTokens(config, tokens, kRowBytes);
    ASSERT_EQ(first % tile, 0) << tokens;
    ASSERT_GE(2 * first, tokens);
    ASSERT_LT(2 * first, tokens + 2 * tile + 1);
    ASSERT_LT(first, tokens);
  }
}

TEST(DeviceStateTest, OneTileLeavesWholeHoweverLarge) {
  const Config config = MakeConfig(2, 4096);
  EXPECT_EQ(FirstPartTokens(config, TileTokens(config), int64_t{1} << 20), 0);
}

TEST(DeviceStateTest, APartOfACombinesRowsIsNeverAllOrNone) {
  for (const int32_t rows : {293, 1000, 33000 * 4}) {
    EXPECT_GT(FirstPartRows(rows, kRowBytes), 0);
    EXPECT_LT(FirstPartRows(rows, kRowBytes), rows);
  }
  // Few rows of many bytes.
  EXPECT_EQ(FirstPartRows(2, int64_t{1} << 30), 0);
}

TEST(DeviceStateTest, SignalsOfPartsRise) {
  EXPECT_LT(SignalOf(7, 0), SignalOf(7, kLastPart));
  EXPECT_LT(SignalOf(7, kLastPart), SignalOf(8, 0));
}

TEST(DeviceStateTest, TilesFitTheirBlocksAndSharedMemory) {
  for (const int32_t top_k : {1, 3, 8, 32}) {
    for (const int32_t num_experts : {8, 256, 4096, 32768}) {
      Config config = MakeConfig(8, 4096);
      config.top_k = top_k;
      config.num_experts = num_experts;
      EXPECT_GE(TileTokens(config), 1);
      EXPECT_LE(TileTokens(config) * top_k, kTileEntries);
      EXPECT_GE(MaxTiles(config) * TileTokens(config), config.max_tokens);
    }
  }
}

}  // namespace
}  // namespace jax_sm_free::cuda
