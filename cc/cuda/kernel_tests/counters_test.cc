// What the kernels count.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cc/cuda/kernel_tests/ops.h"
#include "gtest/gtest.h"

namespace jax_sm_free::cuda::kernel_tests {
namespace {

constexpr uint64_t kMillisecond = 1'000'000;

class CountersTest : public testing::TestWithParam<Case> {
 protected:
  // The number of tokens of `source` that name an expert of `rank`.
  int64_t NumRows(int32_t source, int32_t rank) {
    const Ints& idx = ops.of(source).idx;
    int64_t rows = 0;
    for (int32_t token = 0; token < GetParam().num_tokens; ++token) {
      bool goes = false;
      for (int32_t k = 0; k < kTopK; ++k) {
        const int32_t expert = idx[token * kTopK + k];
        goes = goes || (expert >= 0 && expert / kLocalExperts == rank);
      }
      rows += goes ? 1 : 0;
    }
    return rows;
  }

  std::vector<Floats> NumbersOfAll(int64_t count) {
    std::vector<Floats> numbers;
    numbers.reserve(GetParam().ep_size);
    for (int32_t rank = 0; rank < GetParam().ep_size; ++rank) numbers.push_back(ops.Numbers(count));
    return numbers;
  }

  // One exchange of each kind.
  void RunAll() {
    const Config& config = ops.config();
    const auto y = NumbersOfAll(config.recv_capacity * GetParam().hidden);
    std::vector<Floats> weight_grads;
    std::vector<Floats> dots;
    ops.Dispatch();
    ops.Combine(y, true);
    ops.DispatchBackward(y, NumbersOfAll(config.max_recv_tokens() * kTopK), weight_grads);
    ops.CombineBackward(NumbersOfAll(int64_t{GetParam().num_tokens} * GetParam().hidden), y, dots);
  }

  Ops ops{GetParam()};
};

TEST_P(CountersTest, CountWhatFollowsFromTheRouting) {
  const Case& which = GetParam();
  constexpr int kRounds = 2;
  int64_t dropped = 0;
  for (int round = 0; round < kRounds; ++round) RunAll();
  const int64_t row_bytes = ops.matrix().row_bytes();
  const int64_t wire_bytes = RowFormat{which.wire_format, ops.matrix()}.WireBytes(row_bytes);
  for (int32_t rank = 0; rank < which.ep_size; ++rank) {
    const Counters& counters = ops.group().counters(rank);
    for (const auto count : counters.exchanges) EXPECT_EQ(count, kRounds);
    EXPECT_EQ(counters.rows_dropped, kRounds * ops.of(rank).dropped);
    dropped += ops.of(rank).dropped;
    for (int32_t peer = 0; peer < which.ep_size; ++peer) {
      // Forth go a dispatch and the gradient of a combine. Back go a combine and the gradient of a
      // dispatch.
      const int64_t there = NumRows(rank, peer);
      const int64_t back = NumRows(peer, rank);
      const int64_t sent = there * (wire_bytes + row_bytes) + back * 2 * row_bytes;
      const int64_t received = back * (wire_bytes + row_bytes) + there * 2 * row_bytes;
      EXPECT_EQ(counters.bytes_sent[peer], kRounds * sent) << rank << " to " << peer;
      EXPECT_EQ(counters.bytes_received[peer], kRounds * received) << rank << " from " << peer;
    }
    for (int32_t peer = which.ep_size; peer < kMaxRanks; ++peer) {
      EXPECT_EQ(counters.bytes_sent[peer] + counters.bytes_received[peer], 0);
    }
    EXPECT_EQ(ops.group().fault(rank).code, 0);
  }
  EXPECT_EQ(dropped > 0, which.recv_capacity >= 0);
}

INSTANTIATE_TEST_SUITE_P(
    All, CountersTest,
    testing::Values(Case{1, 20, 8}, Case{3, 50, 8}, Case{2, 50, 8, Routing::kAnywhere, 40},
                    Case{3, 50, 8, Routing::kNowhere},
                    Case{3, 40, 256, Routing::kAnywhere, -1, false, WireFormat::kFloat8Block128},
                    Case{3, 300, 4096, Routing::kNearlyEverywhere}),
    [](const auto& info) { return "Case" + std::to_string(info.index); });

TEST(WaitCountersTest, WhatIsThereIsNotWaitedFor) {
  Ops ops({3, 20, 8});
  ops.Dispatch();
  for (int32_t rank = 0; rank < 3; ++rank) {
    for (const auto waited : ops.group().counters(rank).waited_ns) EXPECT_EQ(waited, 0);
  }
}

TEST(WaitCountersTest, CopiesThatDoNotComeAreWaitedFor) {
  Ops ops({.ep_size = 3, .num_tokens = 20, .hidden = 8, .held_up = true});
  ops.Dispatch();
  for (int32_t rank = 0; rank < 3; ++rank) {
    EXPECT_EQ(ops.group().fault(rank).code, 0);
    for (int32_t peer = 0; peer < 3; ++peer) {
      const uint64_t waited = ops.group().counters(rank).waited_ns[peer];
      if (peer == rank) {
        EXPECT_EQ(waited, 0);
      } else {
        EXPECT_GE(waited, 20 * kMillisecond);  // the patience of await.cuh
      }
    }
  }
}

TEST(WaitCountersTest, WaitsInVainCountForWhoDidNotCome) {
  Ops ops({.ep_size = 3, .num_tokens = 20, .hidden = 8, .timeout_s = 0.05});
  ops.DispatchWithout(1);
  for (const int32_t rank : {0, 2}) {
    const Counters& counters = ops.group().counters(rank);
    EXPECT_EQ(ops.group().fault(rank).code, static_cast<int32_t>(FaultCode::kTimeout));
    EXPECT_EQ(counters.waited_ns[0], 0);
    EXPECT_GE(counters.waited_ns[1], 50 * kMillisecond);
    EXPECT_EQ(counters.waited_ns[2], 0);
    for (const auto count : counters.exchanges) EXPECT_EQ(count, 0);
  }
}

}  // namespace
}  // namespace jax_sm_free::cuda::kernel_tests
