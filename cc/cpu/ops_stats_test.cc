// What the ops count.

#include <cstdint>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "cc/cpu/ops.h"
#include "cc/cpu/ops_testing.h"
#include "cc/cpu/testing.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using testing::BufferOf;
using testing::ConfigFor;
using testing::Describe;
using testing::kMatrix;
using testing::Layer;
using testing::OnEveryRank;
using testing::PlacementOf;
using testing::Source;
using testing::SourcesOf;
using testing::Visits;

constexpr int64_t kRounds = 5;

int64_t DispatchedBytes(const Config& config, const Source& source, int32_t dst) {
  int64_t rows = 0;
  for (int64_t token = 0; token < source.num_tokens; ++token) {
    if (Visits(config, source, token, dst)) ++rows;
  }
  return rows * kMatrix.row_bytes();
}

void RunLayer(const std::shared_ptr<HostBuffer>& buffer, int32_t rank, int64_t round) {
  const Source source = SourcesOf(buffer->config(), round)[rank];
  Layer layer(buffer, rank, round, 0);
  std::vector<std::byte> sums;
  EXPECT_EQ(Describe(layer.SendDispatch(source)), "");
  EXPECT_EQ(Describe(layer.ReceiveDispatch()), "");
  EXPECT_EQ(Describe(layer.SendCombine()), "");
  EXPECT_EQ(Describe(layer.ReceiveCombine(source, sums)), "");
}

// By rank and peer: the bytes that dispatches send from rank to peer in all rounds. By rank: the
// rows dropped.
struct Expected {
  std::vector<std::vector<int64_t>> bytes;
  std::vector<int64_t> dropped;
};
Expected Expect(const Config& config) {
  Expected expected{
      .bytes{static_cast<size_t>(config.ep_size), std::vector<int64_t>(config.ep_size)},
      .dropped = std::vector<int64_t>(config.ep_size)};
  for (int64_t round = 0; round < kRounds; ++round) {
    const std::vector<Source> sources = SourcesOf(config, round);
    for (int32_t rank = 0; rank < config.ep_size; ++rank) {
      expected.dropped[rank] += PlacementOf(config, sources, rank).dropped;
      for (int32_t dst = 0; dst < config.ep_size; ++dst) {
        expected.bytes[rank][dst] += DispatchedBytes(config, sources[rank], dst);
      }
    }
  }
  return expected;
}

TEST(OpsStatsTest, CountsWhatFollowsFromTheRouting) {
  Config config = ConfigFor(3);
  config.recv_capacity = 12;
  const auto buffer = BufferOf(config);
  OnEveryRank(config.ep_size, [&](int32_t rank) {
    for (int64_t round = 0; round < kRounds; ++round) RunLayer(buffer, rank, round);
  });
  const Expected expected = Expect(config);
  EXPECT_GT(std::reduce(expected.dropped.begin(), expected.dropped.end()), 0);
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    const auto stats = std::get<RankStats>(buffer->Stats(rank));
    EXPECT_EQ(stats.exchanges, (std::array<int64_t, kNumKinds>{kRounds, kRounds, 0, 0}));
    EXPECT_EQ(stats.rows_dropped, expected.dropped[rank]);
    for (int32_t peer = 0; peer < config.ep_size; ++peer) {
      // The sums of a combine go in the opposite direction.
      const int64_t bytes = expected.bytes[rank][peer] + expected.bytes[peer][rank];
      EXPECT_EQ(stats.bytes_sent[peer], bytes) << rank << " to " << peer;
      EXPECT_EQ(stats.bytes_received[peer], bytes) << rank << " from " << peer;
    }
    EXPECT_EQ(stats.waited_ns[rank], 0);
  }
}

TEST(OpsStatsTest, NothingIsCountedAtFirst) {
  const auto buffer = BufferOf(ConfigFor(2));
  const auto stats = std::get<RankStats>(buffer->Stats(1));
  EXPECT_EQ(stats.exchanges, (std::array<int64_t, kNumKinds>{}));
  EXPECT_EQ(stats.rows_dropped, 0);
  const std::vector<int64_t> zeros(2);
  EXPECT_EQ(stats.bytes_sent, zeros);
  EXPECT_EQ(stats.bytes_received, zeros);
  EXPECT_EQ(stats.waited_ns, zeros);
}

}  // namespace
}  // namespace jax_sm_free
