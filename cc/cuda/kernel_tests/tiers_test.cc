// What is special of two tiers: rounding, the routing of rail messages, counters, and faults.
// kernels_test.cc has the results of all ops.

#include "cc/tiers.h"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "cc/cpu/numeric.h"
#include "cc/cuda/kernel_tests/checker.h"
#include "cc/cuda/kernel_tests/ops.h"
#include "gtest/gtest.h"

namespace jax_sm_free::cuda::kernel_tests {
namespace {

// ------------------------------------------------------------------------------------------ sums

// A combine of values that do not add up exactly, in one dtype.
template <typename T>
class Sums {
 public:
  using Storage = typename T::Storage;

  Sums(const Case& which, Ops& ops) : case_(which), ops_(ops) {
    for (int32_t rank = 0; rank < which.ep_size; ++rank) {
      Array<Storage>& y = y_.emplace_back(ops.config().recv_capacity * which.hidden);
      for (Storage& value : y) value = T::Store(Random());
      for (float& weight : ops.of(rank).row_weights) weight = Random();
    }
  }

  std::vector<Array<Storage>> Combine() {
    const Matrix matrix{case_.dtype, case_.hidden};
    std::vector<ExpertRows> rows;
    for (int32_t rank = 0; rank < case_.ep_size; ++rank) {
      const auto* y = reinterpret_cast<const std::byte*>(y_[rank].data());
      rows.push_back({y, ops_.of(rank).row_weights.data(), ops_.LayoutOf(rank)});
      SendSums(ops_.CallOf(Op::kCombineSend, rank), {.matrix = matrix, .rows = rows.back()},
               ops_.of(rank).token.data());
    }
    ops_.Move();
    ops_.ForwardAll(Op::kCombineForward);
    std::vector<Array<Storage>> sums;
    for (int32_t rank = 0; rank < case_.ep_size; ++rank) {
      Array<Storage>& out = sums.emplace_back(int64_t{case_.num_tokens} * case_.hidden);
      ReceiveSums(ops_.CallOf(Op::kCombineRecv, rank), ops_.of(rank).token.data(), rows[rank],
                  {.matrix = matrix,
                   .topk = {ops_.of(rank).idx.data(), nullptr, case_.num_tokens},
                   .sums = reinterpret_cast<std::byte*>(out.data())});
    }
    AwaitKernels();
    return sums;
  }

  // The sum for a token: over k, places and nodes, each in order, in float32 and cast once.
  Storage Expected(const Place* places, int32_t column) const {
    const Config& config = ops_.config();
    float total = 0;
    for (int32_t node = 0; node < config.num_nodes; ++node) {
      float of_node = 0;
      for (int32_t i = 0; i < config.node_size(); ++i) {
        const int32_t rank = RankAt(config, node, i);
        float of_rank = 0;
        for (int32_t k = 0; k < kTopK; ++k) {
          if (places[k].rank != rank || places[k].row < 0) continue;
          const float weight = ops_.of(rank).row_weights[places[k].row];
          of_rank += weight * T::Load(y_[rank][places[k].row * case_.hidden + column]);
        }
        of_node += T::Load(T::Store(of_rank));
      }
      total += T::Load(T::Store(of_node));
    }
    return T::Store(total);
  }

 private:
  float Random() { return std::uniform_real_distribution<float>(-3, 3)(random_); }

  const Case& case_;
  Ops& ops_;
  std::mt19937 random_{7};
  std::vector<Array<Storage>> y_;
};

class TierSumsTest : public testing::TestWithParam<Case> {};

TEST_P(TierSumsTest, EachLevelRoundsOnceAndInOrder) {
  const Case& which = GetParam();
  VisitDType(which.dtype, [&]<typename T>() {
    Ops ops(which);
    Checker checker(which, ops);
    ops.Dispatch();
    const Places places = checker.CheckDispatch();
    Sums<T> sums(which, ops);
    const auto got = sums.Combine();
    for (int32_t source = 0; source < which.ep_size; ++source) {
      for (int32_t token = 0; token < which.num_tokens; ++token) {
        for (int32_t h = 0; h < which.hidden; ++h) {
          ASSERT_EQ(got[source][token * which.hidden + h],
                    sums.Expected(&places[source][int64_t{token} * kTopK], h))
              << "rank " << source << ", token " << token << ", column " << h;
        }
      }
    }
    checker.ExpectNoFault();
  });
}

constexpr Case Of(DType dtype, Case which) {
  which.dtype = dtype;
  return which;
}

INSTANTIATE_TEST_SUITE_P(All, TierSumsTest,
                         testing::Values(Of(DType::kFloat32, InTiers({8, 30, 8}, 2, 4)),
                                         Of(DType::kFloat32, InTiers({8, 30, 7}, 4, 1)),
                                         Of(DType::kBFloat16, InTiers({8, 30, 24}, 2, 4)),
                                         Of(DType::kBFloat16, InTiers({8, 30, 11}, 4, 2)),
                                         Of(DType::kFloat16, InTiers({6, 30, 24}, 3, 1)),
                                         // Rows that bulk copies load.
                                         Of(DType::kFloat32, InTiers({8, 20, 256}, 4, 2)),
                                         Of(DType::kBFloat16, InTiers({6, 20, 1800}, 3, 1)),
                                         Of(DType::kFloat16, InTiers({4, 30, 11}, 2, 2))),
                         [](const auto& info) { return "Case" + std::to_string(info.index); });

// --------------------------------------------------------------------------------------- routing

// The node experts that the tokens of `source` name on `node`, for tokens that name any.
std::vector<int32_t> RoutingOn(Ops& ops, int32_t node, int32_t source) {
  const Config& config = ops.config();
  const Ints& idx = ops.of(source).idx;
  const int32_t node_experts = config.node_size() * kLocalExperts;
  std::vector<int32_t> routing;
  for (size_t first = 0; first < idx.size(); first += kTopK) {
    std::vector<int32_t> row(kTopK, -1);
    bool goes = false;
    for (int32_t k = 0; k < kTopK; ++k) {
      const int32_t expert = idx[first + k];
      if (expert < 0 || SortedByNode(config, expert) / node_experts != node) continue;
      row[k] = SortedByNode(config, expert) % node_experts;
      goes = true;
    }
    if (goes) routing.insert(routing.end(), row.begin(), row.end());
  }
  return routing;
}

class TierRoutingTest : public testing::TestWithParam<Case> {
 protected:
  Ops ops{GetParam()};
};

TEST_P(TierRoutingTest, NodeTopkIsTheRoutingOfTheRailMessages) {
  const Config& config = ops.config();
  const size_t block = size_t(config.max_tokens) * kTopK;
  for (int round = 0; round < 2; ++round) {
    ops.Dispatch();
    for (int32_t rank = 0; rank < config.ep_size; ++rank) {
      const int32_t own = NodeOf(config, rank);
      for (int32_t node = 0; node < config.num_nodes; ++node) {
        const int32_t source = RankAt(config, node, PlaceInNode(config, rank));
        std::vector<int32_t> expected;
        if (node != own) expected = RoutingOn(ops, own, source);
        expected.resize(block, -1);
        const auto* got = ops.of(rank).node_topk.data() + node * block;
        EXPECT_EQ(std::vector<int32_t>(got, got + block), expected) << rank << ", node " << node;
      }
    }
  }
}

TEST_P(TierRoutingTest, BytesCountForWhoSendsThem) {
  const Config& config = ops.config();
  Checker checker(GetParam(), ops);
  ops.Dispatch();
  // Tokens of `source` with an expert on `rank`.
  const auto num_rows = [&](int32_t source, int32_t rank) {
    int64_t rows = 0;
    for (int32_t t = 0; t < GetParam().num_tokens; ++t) rows += checker.GoesTo(rank, source, t);
    return rows;
  };
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    const int32_t node = NodeOf(config, rank);
    const int32_t place = PlaceInNode(config, rank);
    for (int32_t peer = 0; peer < config.ep_size; ++peer) {
      int64_t sent = 0;
      if (NodeOf(config, peer) == node) {
        // Its own rows, and those of its rail.
        for (int32_t m = 0; m < config.num_nodes; ++m) {
          sent += num_rows(RankAt(config, m, place), peer);
        }
      } else if (PlaceInNode(config, peer) == place) {
        const std::vector<int32_t> rail = RoutingOn(ops, NodeOf(config, peer), rank);
        sent = static_cast<int64_t>(rail.size()) / kTopK;
      }
      const int64_t row_bytes = ops.matrix().row_bytes();
      EXPECT_EQ(ops.group().counters(rank).bytes_sent[peer], sent * row_bytes) << rank << peer;
      EXPECT_EQ(ops.group().counters(peer).bytes_received[rank], sent * row_bytes) << rank << peer;
    }
    EXPECT_EQ(ops.group().counters(rank).exchanges[static_cast<int>(Kind::kDispatch)], 1U);
  }
}

INSTANTIATE_TEST_SUITE_P(All, TierRoutingTest,
                         testing::Values(InTiers({8, 40, 8}, 2, 4), InTiers({6, 40, 8}, 3, 1),
                                         InTiers({4, 300, 8}, 2, 2),
                                         InTiers({4, 20, 8, Routing::kToFirstRank}, 2, 2),
                                         InTiers({4, 20, 8, Routing::kNowhere}, 2, 1)),
                         NameOf);

// ---------------------------------------------------------------------------------------- faults

class TierFaultsTest : public testing::Test {
 protected:
  static constexpr Case kCase =
      InTiers({.ep_size = 4, .num_tokens = 10, .hidden = 8, .timeout_s = 0.05}, 2, 2);

  void ExpectFault(int32_t rank, FaultCode code, Op op) {
    EXPECT_EQ(ops.group().fault(rank).code, static_cast<int32_t>(code)) << "rank " << rank;
    EXPECT_EQ(ops.group().fault(rank).op, static_cast<int32_t>(op)) << "rank " << rank;
  }
  void ExpectPoisoned(int32_t rank) {
    for (const float value : ops.of(rank).rows) ASSERT_TRUE(std::isnan(value)) << rank;
  }
  std::vector<Floats> NumbersOfAll(int64_t count) {
    std::vector<Floats> numbers;
    numbers.reserve(kCase.ep_size);
    for (int32_t rank = 0; rank < kCase.ep_size; ++rank) numbers.push_back(ops.Numbers(count));
    return numbers;
  }

  Ops ops{kCase};
};

TEST_F(TierFaultsTest, AnIndexOutOfRangePoisonsAll) {
  ops.of(1).idx[13] = 99;
  ops.Dispatch();
  ExpectFault(1, FaultCode::kIndex, Op::kDispatchSend);
  ExpectFault(3, FaultCode::kPeer, Op::kDispatchForward);  // its rail peer
  EXPECT_EQ(ops.group().fault(3).peer, 1);
  for (int32_t rank = 0; rank < 4; ++rank) ExpectPoisoned(rank);
}

TEST_F(TierFaultsTest, AnExchangeIsForwardedOnce) {
  for (int32_t rank = 0; rank < 4; ++rank) ops.SendDispatch(rank);
  ops.Move();
  const Floats token = ops.of(0).token;
  ops.ForwardDispatch(0);
  ops.of(0).token = token;
  ops.ForwardDispatch(0);
  ExpectFault(0, FaultCode::kTokenUsed, Op::kDispatchForward);
  for (const int32_t expert : ops.of(0).node_topk) EXPECT_EQ(expert, -1);
  // It has written no token.
  ops.RecvDispatch(0);
  ExpectPoisoned(0);
}

TEST_F(TierFaultsTest, ARecvNeedsAForward) {
  for (int32_t rank = 0; rank < 4; ++rank) ops.SendDispatch(rank);
  ops.Move();
  ops.RecvDispatch(2);
  ExpectFault(2, FaultCode::kNotForwarded, Op::kDispatchRecv);
  ExpectPoisoned(2);
}

TEST_F(TierFaultsTest, AForwardNeedsASend) {
  ops.ForwardDispatch(0);
  ExpectFault(0, FaultCode::kToken, Op::kDispatchForward);
}

TEST_F(TierFaultsTest, ASilentRailPeerIsNamed) {
  ops.DispatchWithout(1);
  // Rank 3 waits for its rail peer. Rank 2 gets nothing from rank 1 through rank 3.
  ExpectFault(3, FaultCode::kTimeout, Op::kDispatchForward);
  EXPECT_EQ(ops.group().fault(3).peer, 1);
  EXPECT_EQ(ops.group().fault(3).detail, 0b0010);
  ExpectFault(0, FaultCode::kTimeout, Op::kDispatchRecv);
  EXPECT_EQ(ops.group().fault(0).peer, 1);
  EXPECT_EQ(ops.group().fault(0).detail, 0b1010);  // its own message, and that of its rail
  EXPECT_EQ(ops.group().counters(3).waited_ns[0], 0U);
  EXPECT_GT(ops.group().counters(3).waited_ns[1], 0U);
  for (const int32_t rank : {0, 2, 3}) ExpectPoisoned(rank);
}

TEST_F(TierFaultsTest, ARankThatDoesNotForwardIsMissed) {
  for (int32_t rank = 0; rank < 4; ++rank) ops.SendDispatch(rank);
  ops.Move();
  for (const int32_t rank : {0, 1, 3}) ops.ForwardDispatch(rank);
  ops.Move();
  ops.RecvDispatch(3);
  ExpectFault(3, FaultCode::kTimeout, Op::kDispatchRecv);
  EXPECT_EQ(ops.group().fault(3).detail, 0b0001);  // the source of what rank 2 has not forwarded
}

TEST_F(TierFaultsTest, RoutingThatNamesNoExpertIsRefused) {
  ops.Dispatch();
  ops.of(2).node_topk[5] = 2 * kLocalExperts;
  const auto sums = ops.Combine(NumbersOfAll(ops.config().recv_capacity * kCase.hidden), false);
  ExpectFault(2, FaultCode::kIndex, Op::kCombineForward);
  EXPECT_EQ(ops.group().fault(2).seen, 2 * kLocalExperts);
  EXPECT_EQ(ops.group().fault(2).detail, 5);
  ExpectFault(0, FaultCode::kPeer, Op::kCombineRecv);  // its rail peer
  for (const float value : sums[0]) EXPECT_TRUE(std::isnan(value));
}

TEST_F(TierFaultsTest, RoutingOfAnotherDispatchIsRefused) {
  ops.Dispatch();
  ops.of(2).node_topk.assign(ops.of(2).node_topk.size(), -1);
  const auto y = NumbersOfAll(ops.config().recv_capacity * kCase.hidden);
  std::vector<Floats> dots;
  ops.CombineBackward(NumbersOfAll(int64_t{kCase.num_tokens} * kCase.hidden), y, dots);
  ExpectFault(2, FaultCode::kOutOfStep, Op::kCombineBackwardForward);
  ExpectFault(3, FaultCode::kPeer, Op::kCombineBackwardRecv);
}

}  // namespace
}  // namespace jax_sm_free::cuda::kernel_tests
