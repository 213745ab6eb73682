#include "cc/cuda/rank_view.h"

#include <algorithm>
#include <cstdint>
#include <set>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace jax_sm_free::cuda {
namespace {

constexpr Config MakeConfig(int32_t ep_size, int32_t num_nodes, int32_t node_stride) {
  return {.ep_size = ep_size,
          .num_experts = 4 * ep_size,
          .top_k = 8,
          .max_tokens = 16,
          .num_slots = 3,
          .row_bytes = 64,
          .num_nodes = num_nodes,
          .node_stride = node_stride};
}

class RankViewTest : public testing::TestWithParam<Config> {};

TEST_P(RankViewTest, BothEndsAgreeOnAMessage) {
  const Config& config = GetParam();
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    const MessageTable own = MessagesOf(config, rank);
    std::set<std::pair<int32_t, int32_t>> ends;
    for (int32_t message = 0; message < NumMessages(config); ++message) {
      const OtherEnd& end = own.end[message];
      const OtherEnd back = MessagesOf(config, end.rank).end[end.message];
      EXPECT_EQ(back.rank, rank);
      EXPECT_EQ(back.message, message);
      EXPECT_EQ(back.stage, end.stage_there);
      EXPECT_EQ(back.stage_there, end.stage);
      ends.emplace(end.rank, end.message);
      // Messages go within a node, or along a rail.
      if (message < config.ep_size) {
        EXPECT_EQ(NodeOf(config, end.rank), NodeOf(config, rank));
        EXPECT_EQ(PlaceInNode(config, end.rank), PlaceInNode(config, message));
      } else {
        EXPECT_NE(NodeOf(config, end.rank), NodeOf(config, rank));
        EXPECT_EQ(PlaceInNode(config, end.rank), PlaceInNode(config, rank));
      }
    }
    EXPECT_EQ(ends.size(), static_cast<size_t>(NumMessages(config)));
  }
}

TEST_P(RankViewTest, EachMessageHasAStageOfItsOwn) {
  const Config& config = GetParam();
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    const RankView view = ViewOf(config, rank);
    std::vector<int64_t> offsets;
    for (int32_t slot = 0; slot < config.num_slots; ++slot) {
      for (int32_t message = 0; message < NumMessages(config); ++message) {
        const OtherEnd& end = view.messages.end[message];
        if (end.rank != rank) offsets.push_back(StageOffset(view, slot, end.stage));
      }
    }
    std::sort(offsets.begin(), offsets.end());
    ASSERT_EQ(offsets.size(), size_t(config.num_slots) * (config.ep_size - 1));
    if (offsets.empty()) continue;
    EXPECT_EQ(offsets.front(), view.regions.stage);
    for (size_t i = 1; i < offsets.size(); ++i) {
      EXPECT_EQ(offsets[i] - offsets[i - 1], view.regions.message_bytes);
    }
    EXPECT_EQ(offsets.back() + view.regions.message_bytes, view.regions.total);
  }
}

TEST_P(RankViewTest, ASendOfRowsSendsTheMessagesOfAllLanes) {
  const Config& config = GetParam();
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    const MessageTable table = MessagesOf(config, rank);
    const std::set<int32_t> of_lanes(table.of_lane, table.of_lane + table.num_lanes);
    const std::set<int32_t> sent(table.rows_sent, table.rows_sent + table.num_lanes);
    EXPECT_EQ(of_lanes.size(), static_cast<size_t>(table.num_lanes));
    EXPECT_EQ(of_lanes, sent);
    EXPECT_EQ(table.rows_sent[table.num_lanes - 1], rank);
    for (const int32_t message : of_lanes) {
      // The message of a lane has the number of its source: that of the rank itself, or on a rail.
      const OtherEnd& end = table.end[message];
      EXPECT_EQ(end.message < config.ep_size, message < config.ep_size);
      if (message < config.ep_size) {
        EXPECT_EQ(end.message, rank);
      }
    }
  }
}

TEST_P(RankViewTest, EachRankIsOnceInEachOrder) {
  const Config& config = GetParam();
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    const MessageTable table = MessagesOf(config, rank);
    const auto check = [&](const uint8_t* order) {
      EXPECT_EQ(std::set<int32_t>(order, order + config.ep_size).size(),
                static_cast<size_t>(config.ep_size));
    };
    check(table.sums_sent);
    check(table.rows_received);
    EXPECT_EQ(table.sums_sent[config.ep_size - 1], rank);
    EXPECT_EQ(table.rows_received[0], rank);
    const int32_t num_foreign = config.ep_size - config.node_size();
    for (int32_t i = 0; i < config.ep_size; ++i) {
      EXPECT_EQ(NodeOf(config, table.sums_sent[i]) == NodeOf(config, rank), i >= num_foreign);
      EXPECT_EQ(NodeOf(config, table.rows_received[i]) == NodeOf(config, rank),
                i < config.node_size());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, RankViewTest,
                         testing::Values(MakeConfig(1, 1, 1), MakeConfig(4, 1, 1),
                                         MakeConfig(32, 1, 1), MakeConfig(4, 2, 2),
                                         MakeConfig(8, 2, 1), MakeConfig(8, 4, 2),
                                         MakeConfig(12, 3, 2), MakeConfig(2, 2, 1),
                                         MakeConfig(32, 32, 1), MakeConfig(32, 4, 8)));

TEST(OneTierTest, InOneTierMessagesAreNumberedByRank) {
  const MessageTable table = MessagesOf(MakeConfig(4, 1, 1), 2);
  for (int32_t rank = 0; rank < 4; ++rank) {
    EXPECT_EQ(table.end[rank].rank, rank);
    EXPECT_EQ(table.end[rank].message, 2);
    EXPECT_EQ(table.of_lane[rank], rank);
    EXPECT_EQ(table.rows_sent[rank], (2 + 1 + rank) % 4);
    EXPECT_EQ(table.sums_sent[rank], (2 + 1 + rank) % 4);
    EXPECT_EQ(table.rows_received[rank], (2 + 4 - rank) % 4);
  }
}

// Where each byte of an order's message is copied from; -1 where none is.
std::vector<int64_t> SourcesOf(const RankView& view, const CopyOrder& order, int64_t size) {
  std::vector<int64_t> sources(size, -1);
  for (const Piece& piece : PiecesOf(view, order)) {
    for (int64_t i = 0; i < piece.bytes; ++i) {
      EXPECT_EQ(sources[piece.begin + i], -1);
      sources[piece.begin + i] = piece.source + i;
    }
  }
  return sources;
}

TEST(OrdersTest, AnOrderIsOfThePiecesOfItsMessage) {
  const RankView view = ViewOf(MakeConfig(4, 1, 1), 1);
  for (const int32_t dst : {2, 3, 0}) {
    const int64_t stage = StageOffset(view, 2, view.messages.end[dst].stage);
    for (const int64_t begin : {0, 30, 60}) {
      for (const int64_t common : {60, 80, 100}) {
        const int64_t common_at = StageOffset(view, 2, 0) + common;
        const CopyOrder order{dst, 2, begin, 100, common, common_at, 1};
        const std::vector<int64_t> sources = SourcesOf(view, order, 100);
        for (int64_t i = 0; i < 100; ++i) {
          const int64_t from = i < common ? stage + i : common_at + i - common;
          EXPECT_EQ(sources[i], i < begin ? -1 : from) << begin << " " << common << " " << i;
        }
      }
    }
  }
}

}  // namespace
}  // namespace jax_sm_free::cuda
