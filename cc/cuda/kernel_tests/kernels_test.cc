// Compares what kernels compute with loops over all choices of all tokens.

#include "cc/cuda/kernels/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "cc/cuda/kernel_tests/checker.h"
#include "cc/cuda/kernel_tests/ops.h"
#include "cc/cuda/rank_view.h"
#include "gtest/gtest.h"

namespace jax_sm_free::cuda::kernel_tests {
namespace {

class KernelsTest : public testing::TestWithParam<Case> {
 protected:
  std::vector<Floats> NumbersOfAll(int64_t count) {
    std::vector<Floats> numbers;
    numbers.reserve(GetParam().ep_size);
    for (int32_t rank = 0; rank < GetParam().ep_size; ++rank) numbers.push_back(ops.Numbers(count));
    return numbers;
  }

  Ops ops{GetParam()};
  Checker checker{GetParam(), ops};
};

TEST_P(KernelsTest, ThereAndBackAgain) {
  const Case& which = GetParam();
  for (int round = 0; round < 3; ++round) {  // each slot is used more than once
    ops.Dispatch();
    const Places places = checker.CheckDispatch();
    const auto y = NumbersOfAll(ops.config().recv_capacity * which.hidden);
    const auto weight = [&](const Place& place) {
      return ops.of(place.rank).row_weights[place.row];
    };
    const auto one = [](const Place&) { return 1.0F; };
    checker.CheckSums(places, y, weight, ops.Combine(y, true));
    checker.CheckSums(places, y, one, ops.Combine(y, false));

    const auto row_grads = NumbersOfAll(ops.config().max_recv_tokens() * kTopK);
    std::vector<Floats> weight_grads;
    checker.CheckSums(places, y, one, ops.DispatchBackward(y, row_grads, weight_grads));
    for (int32_t source = 0; source < which.ep_size; ++source) {
      for (int32_t i = 0; i < which.num_tokens * kTopK; ++i) {
        const Place& place = places[source][i];
        const int64_t entry = place.token_row * kTopK + i % kTopK;
        ASSERT_EQ(weight_grads[source][i], place.rank < 0 ? 0 : row_grads[place.rank][entry]);
      }
    }
    checker.ExpectNoFault();
  }
}

TEST_P(KernelsTest, GradientsOfACombine) {
  const Case& which = GetParam();
  ops.Dispatch();
  const Places places = checker.CheckDispatch();
  const auto y = NumbersOfAll(ops.config().recv_capacity * which.hidden);
  const auto grads = NumbersOfAll(int64_t{which.num_tokens} * which.hidden);
  std::vector<Floats> dots;
  const std::vector<Floats> y_grads = ops.CombineBackward(grads, y, dots);
  std::vector<int64_t> num_rows(which.ep_size);
  for (int32_t source = 0; source < which.ep_size; ++source) {
    for (int32_t i = 0; i < which.num_tokens * kTopK; ++i) {
      const Place& place = places[source][i];
      if (place.row < 0) continue;
      ++num_rows[place.rank];
      const float* grad = grads[source].data() + int64_t{i} / kTopK * which.hidden;
      const float weight = ops.of(place.rank).row_weights[place.row];
      float dot = 0;
      for (int32_t h = 0; h < which.hidden; ++h) {
        const int64_t at = place.row * which.hidden + h;
        ASSERT_EQ(y_grads[place.rank][at], weight * grad[h]);
        dot += grad[h] * y[place.rank][at];
      }
      ASSERT_EQ(dots[place.rank][place.row], dot);
    }
  }
  for (int32_t rank = 0; rank < which.ep_size; ++rank) {
    for (size_t i = num_rows[rank] * which.hidden; i < y_grads[rank].size(); ++i) {
      ASSERT_EQ(y_grads[rank][i], 0);
    }
  }
  checker.ExpectNoFault();
}

TEST_P(KernelsTest, ByTokens) {
  const Case& which = GetParam();
  const Array<TokenArrays> results = ops.DispatchByTokens();
  for (int32_t rank = 0; rank < which.ep_size; ++rank) {
    const TokenArrays& got = results[rank];
    int64_t row = 0;
    for (int32_t source = 0; source < which.ep_size; ++source) {
      const Floats x = checker.Expected(source);
      const Arrays& from = ops.of(source);
      for (int32_t token = 0; token < which.num_tokens; ++token) {
        if (!checker.GoesTo(rank, source, token)) continue;
        for (int32_t h = 0; h < which.hidden; ++h) {
          ASSERT_EQ(got.rows[row * which.hidden + h], x[token * which.hidden + h]);
        }
        for (int32_t k = 0; k < kTopK; ++k) {
          const int32_t expert = from.idx[token * kTopK + k];
          const bool here = expert >= 0 && expert / kLocalExperts == rank;
          ASSERT_EQ(got.topk_idx[row * kTopK + k], here ? expert % kLocalExperts : -1);
          ASSERT_EQ(got.topk_weights[row * kTopK + k], here ? from.weights[token * kTopK + k] : 0);
        }
        ++row;
      }
    }
    EXPECT_EQ(got.num_tokens, row);
    for (size_t i = row * which.hidden; i < got.rows.size(); ++i) ASSERT_EQ(got.rows[i], 0);
  }
  checker.ExpectNoFault();
}

INSTANTIATE_TEST_SUITE_P(
    All, KernelsTest,
    testing::Values(
        Case{1, 5, 8}, Case{2, 1, 7}, Case{2, 40, 8}, Case{3, 40, 7}, Case{4, 33, 64},
        Case{8, 20, 8}, Case{12, 10, 8}, Case{4, 20, 8, Routing::kEverywhere},
        Case{2, 40, 8, Routing::kNearlyEverywhere}, Case{4, 40, 8, Routing::kNearlyEverywhere},
        Case{3, 40, 8, Routing::kNearlyEverywhere, -1, true},
        Case{4, 20, 8, Routing::kEverywhere, -1, true},
        Case{3, 40, 256, Routing::kNearlyEverywhere, -1, false, WireFormat::kFloat8Block128},
        Case{3, 40, 256, Routing::kNearlyEverywhere, -1, true, WireFormat::kFloat8Block128},
        Case{4, 20, 8, Routing::kToFirstRank}, Case{3, 40, 600}, Case{4, 20, 7, Routing::kNowhere},
        Case{2, 40, 8, Routing::kAnywhere, 50}, Case{4, 20, 7, Routing::kAnywhere, 0},
        Case{2, 12, 8, Routing::kAnywhere, -1, true},
        Case{3, 20, 200, Routing::kAnywhere, -1, false, WireFormat::kFloat8Block128},
        Case{2, 20, 256, Routing::kEverywhere, -1, false, WireFormat::kFloat8Block128}),
    NameOf);

INSTANTIATE_TEST_SUITE_P(
    TwoTiers, KernelsTest,
    testing::Values(
        InTiers({2, 30, 8}, 2, 1), InTiers({4, 40, 8}, 2, 2), InTiers({4, 40, 7}, 2, 1),
        InTiers({8, 30, 64}, 2, 4), InTiers({8, 30, 8}, 4, 2), InTiers({8, 30, 8}, 2, 2),
        InTiers({6, 30, 8}, 3, 1), InTiers({4, 300, 8}, 2, 2), InTiers({4, 1, 8}, 2, 2),
        InTiers({4, 20, 8, Routing::kNowhere}, 2, 2),
        InTiers({4, 20, 8, Routing::kToFirstRank}, 2, 2),
        InTiers({4, 20, 8, Routing::kToFirstRank}, 2, 1),
        InTiers({4, 20, 8, Routing::kEverywhere}, 2, 2),
        InTiers({4, 40, 8, Routing::kAnywhere, 50}, 2, 2),
        InTiers({4, 20, 8, Routing::kAnywhere, -1, true}, 2, 2),
        InTiers({6, 20, 8, Routing::kEverywhere, -1, true}, 3, 1),
        InTiers({4, 40, 256, Routing::kAnywhere, -1, false, WireFormat::kFloat8Block128}, 2, 2),
        InTiers({4, 20, 200, Routing::kAnywhere, -1, true, WireFormat::kFloat8Block128}, 2, 1)),
    NameOf);

class KernelsInPartsTest : public testing::TestWithParam<Case> {};

TEST_P(KernelsInPartsTest, LargeMessagesComeInParts) {
  Ops ops(GetParam());
  ops.Dispatch();
  Checker checker(GetParam(), ops);
  checker.CheckDispatch();
  checker.ExpectNoFault();
  // What a forward makes leaves whole.
  const Config& config = ops.config();
  const int64_t num_sent = int64_t{config.ep_size} * (NumLanes(config) - 1);
  const int64_t num_forwarded =
      int64_t{config.ep_size} * (config.num_nodes - 1) * (config.node_size() - 1);
  const int64_t num_first = GetParam().held_up ? 0 : num_sent;
  const int64_t num_last = GetParam().held_up ? 0 : num_sent + num_forwarded;
  EXPECT_EQ(ops.group().num_first_parts(), num_first);
  EXPECT_EQ(ops.group().num_last_parts(), num_last);
}

// Where copies are held up, messages are unpacked turn by turn.
INSTANTIATE_TEST_SUITE_P(
    All, KernelsInPartsTest,
    testing::Values(Case{3, 300, 4096}, Case{3, 300, 4096, Routing::kEverywhere},
                    Case{3, 300, 4096, Routing::kNearlyEverywhere},
                    Case{3, 300, 4096, Routing::kAnywhere, -1, true},
                    Case{3, 300, 4096, Routing::kNearlyEverywhere, -1, true},
                    InTiers({4, 300, 4096}, 2, 2),
                    InTiers({4, 300, 4096, Routing::kAnywhere, -1, true}, 2, 1)),
    NameOf);

TEST(KernelsFaultTest, AnIndexOutOfRangeIsNamedAndPoisonsAll) {
  Ops ops({2, 10, 8});
  ops.of(1).idx[13] = 99;
  ops.Dispatch();
  const FaultRecord& fault = ops.group().fault(1);
  EXPECT_EQ(fault.code, static_cast<int32_t>(FaultCode::kIndex));
  EXPECT_EQ(fault.seen, 99);
  EXPECT_EQ(fault.detail, 13);
  EXPECT_EQ(ops.group().fault(0).code, static_cast<int32_t>(FaultCode::kPeer));
  for (int32_t rank = 0; rank < 2; ++rank) {
    for (const float value : ops.of(rank).rows) ASSERT_TRUE(std::isnan(value));
  }
}

TEST(KernelsFaultTest, ATokenIsGoodForOneReceive) {
  Ops ops({1, 10, 8});
  ops.Dispatch();
  EXPECT_EQ(ops.group().fault(0).code, 0);
  ops.RecvDispatch(0);
  EXPECT_EQ(ops.group().fault(0).code, static_cast<int32_t>(FaultCode::kTokenUsed));
}

TEST(KernelsFaultTest, ATokenThatIsNoneIsNamed) {
  Ops ops({2, 10, 8});
  ops.RecvDispatch(0);  // without a send
  EXPECT_EQ(ops.group().fault(0).code, static_cast<int32_t>(FaultCode::kToken));
  for (const float value : ops.of(0).rows) ASSERT_TRUE(std::isnan(value));
}

}  // namespace
}  // namespace jax_sm_free::cuda::kernel_tests
