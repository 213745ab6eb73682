#include "cc/cuda/device_state.h"

#include <algorithm>
#include <cstdint>
#include <random>
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
    const int64_t num_messages = int64_t{3} * ep_size;
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

TEST(DeviceStateTest, TwoTiersHaveRailMessages) {
  Config config = MakeConfig(8, 4096);
  const RegionLayout one_tier = RegionsOf(config);
  config.num_nodes = 4;
  const RegionLayout regions = RegionsOf(config);
  EXPECT_EQ(one_tier.num_messages, 8);
  EXPECT_EQ(regions.num_messages, 8 + 3);
  // A notice counts rows for the experts of two ranks.
  EXPECT_GE(regions.notice_bytes - static_cast<int64_t>(sizeof(MessageHeader)), 2 * 64 * 4);
  EXPECT_EQ(regions.stage - regions.recv, int64_t{3} * 11 * regions.message_bytes);
  EXPECT_EQ(regions.total - regions.stage, int64_t{3} * 7 * regions.message_bytes);
}

TEST(DeviceStateTest, SmallExchangesLeaveWhole) {
  const Config config = MakeConfig(4, 4096);
  const auto most = static_cast<int32_t>(((int64_t{4} << 20) - 1) / kRowBytes);
  for (const int32_t rows : {0, 1, 128, most}) {
    EXPECT_EQ(FirstPartTokens(TileTokens(config), rows, kRowBytes), 0) << rows;
    EXPECT_EQ(FirstPartRows(rows, kRowBytes), 0) << rows;
  }
  EXPECT_GT(FirstPartTokens(TileTokens(config), most + 1, kRowBytes), 0);
  EXPECT_GT(FirstPartRows(most + 1, kRowBytes), 0);
}

TEST(DeviceStateTest, TheFirstPartIsHalfOfTheTokensInWholeTiles) {
  const Config config = MakeConfig(4, 4096);
  const int32_t tile = TileTokens(config);
  for (int64_t tokens = 293; tokens <= 4096; ++tokens) {
    const int64_t first = FirstPartTokens(TileTokens(config), tokens, kRowBytes);
    ASSERT_EQ(first % tile, 0) << tokens;
    ASSERT_GE(2 * first, tokens);
    ASSERT_LT(2 * first, tokens + int64_t{2} * tile + 1);
    ASSERT_LT(first, tokens);
  }
}

TEST(DeviceStateTest, OneTileLeavesWholeHoweverLarge) {
  const Config config = MakeConfig(2, 4096);
  EXPECT_EQ(FirstPartTokens(TileTokens(config), TileTokens(config), int64_t{1} << 20), 0);
}

TEST(DeviceStateTest, APartOfACombinesRowsIsNeverAllOrNone) {
  for (const int32_t rows : {293, 1000, 33000 * 4}) {
    EXPECT_GT(FirstPartRows(rows, kRowBytes), 0);
    EXPECT_LT(FirstPartRows(rows, kRowBytes), rows);
  }
  // Few rows of many bytes.
  EXPECT_EQ(FirstPartRows(2, int64_t{1} << 30), 0);
}

TEST(DeviceStateTest, RowsAreStagedOnceWhereAtLeastHalfOfThemGoToAllRanks) {
  const Config config = MakeConfig(4, 4096);
  EXPECT_TRUE(StagesOnce(config, 500, 1000));
  EXPECT_FALSE(StagesOnce(config, 499, 1000));
  EXPECT_FALSE(StagesOnce(config, 0, 0));
  EXPECT_FALSE(StagesOnce(MakeConfig(2, 4096), 1000, 1000));  // nobody to share them with
}

TEST(DeviceStateTest, EachRowHasAPlaceOfItsOwnInItsPart) {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    // Tokens that go to a rank, in order; those of the first part; of all of them, common ones.
    const auto num_tokens = static_cast<int32_t>(random() % 30);
    const auto half = static_cast<int32_t>(random() % (num_tokens + 1));
    std::vector<bool> goes(num_tokens);
    std::vector<bool> is_common(num_tokens);
    Placing placing{};
    for (int32_t token = 0; token < num_tokens; ++token) {
      is_common[token] = random() % 2 == 0;
      goes[token] = is_common[token] || random() % 2 == 0;
      placing.num_rows += goes[token];
      placing.num_common += is_common[token];
      if (token >= half) continue;
      placing.first_part += goes[token];
      placing.first_common += is_common[token];
    }
    std::vector<int32_t> number_at(placing.num_rows, -1);
    int32_t number = 0;
    int32_t common_before = 0;
    for (int32_t token = 0; token < num_tokens; ++token) {
      if (!goes[token]) continue;
      const CommonBefore before{common_before, is_common[token]};
      const int32_t place = PlaceOf(placing, number, CommonBefore::Of(before.number()));
      ASSERT_TRUE(0 <= place && place < placing.num_rows);
      EXPECT_EQ(number_at[place], -1);
      number_at[place] = number;
      EXPECT_EQ(place < placing.first_part, token < half);
      // Common rows lie alike in all messages, whatever else is in their part.
      const Placing other{placing.num_rows + 7, placing.first_part + 3, placing.num_common,
                          placing.first_common};
      if (placing.num_common > 0) {
        const int32_t there = PlaceInOther(placing, place, other);
        EXPECT_EQ(there, is_common[token] ? place + (token < half ? 3 : 7) : -1);
      }
      ++number;
      common_before += is_common[token];
    }
  }
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
