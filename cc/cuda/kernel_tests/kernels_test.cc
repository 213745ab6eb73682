// Compares what kernels compute with loops over all choices of all tokens.

#include "cc/cuda/kernels/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "cc/cpu/wire_rows.h"
#include "cc/cuda/kernel_tests/ops.h"
#include "gtest/gtest.h"

namespace jax_sm_free::cuda::kernel_tests {
namespace {

// Where the row of a choice (token, k) of a rank should be.
struct Place {
  int32_t rank = -1;      // the owner of its expert
  int64_t token_row = 0;  // of its token there
  int64_t row = -1;       // its expert row; -1 for none, or for a dropped row
};
using Places = std::vector<std::vector<Place>>;  // by source, [T * top_k]

class Checker {
 public:
  Checker(const Case& which, Ops& ops) : case_(which), ops_(ops) {}

  // The rows of x as they should arrive.
  Floats Expected(int32_t source) {
    const Floats& x = ops_.of(source).x;
    const RowFormat format{case_.wire_format, ops_.matrix()};
    ConstRows given;
    given.values = reinterpret_cast<const std::byte*>(x.data());
    given.values_bytes = ops_.matrix().row_bytes();
    const WireRows travelling(format, given, case_.num_tokens);
    const ConstRows& rows = travelling.rows();
    Floats back(x.size());
    MutableRows out;
    out.values = reinterpret_cast<std::byte*>(back.data());
    out.values_bytes = given.values_bytes;
    std::vector<std::byte> wire(rows.row_bytes());
    for (int64_t i = 0; i < case_.num_tokens; ++i) {
      std::copy_n(rows.values + i * rows.values_bytes, rows.values_bytes, wire.begin());
      std::copy_n(rows.scales + i * rows.scales_bytes, rows.scales_bytes,
                  wire.begin() + rows.values_bytes);
      PutRow(format, wire.data(), out, i);
    }
    return back;
  }

  bool GoesTo(int32_t rank, int32_t source, int32_t token) {
    for (int32_t k = 0; k < kTopK; ++k) {
      const int32_t expert = ops_.of(source).idx[token * kTopK + k];
      if (expert >= 0 && expert / kLocalExperts == rank) return true;
    }
    return false;
  }

  // Checks the rows of a dispatch, and returns where they should be.
  Places CheckDispatch() {
    Places places(case_.ep_size, std::vector<Place>(int64_t{case_.num_tokens} * kTopK));
    std::vector<Floats> x;
    x.reserve(case_.ep_size);
    for (int32_t source = 0; source < case_.ep_size; ++source) x.push_back(Expected(source));
    for (int32_t rank = 0; rank < case_.ep_size; ++rank) {
      FindTokenRows(rank, places);
      CheckGroups(rank, x, places);
    }
    return places;
  }

  // Checks sums over the choices of a token: of weight(place) times the row of the choice.
  template <typename Weight>
  void CheckSums(const Places& places, const std::vector<Floats>& y, const Weight& weight,
                 const std::vector<Floats>& sums) {
    for (int32_t source = 0; source < case_.ep_size; ++source) {
      for (int32_t token = 0; token < case_.num_tokens; ++token) {
        for (int32_t h = 0; h < case_.hidden; ++h) {
          float sum = 0;
          for (int32_t k = 0; k < kTopK; ++k) {
            const Place& place = places[source][token * kTopK + k];
            if (place.row < 0) continue;
            sum += weight(place) * y[place.rank][place.row * case_.hidden + h];
          }
          ASSERT_EQ(sums[source][token * case_.hidden + h], sum)
              << "rank " << source << ", token " << token;
        }
      }
    }
  }

  void ExpectNoFault() {
    for (int32_t rank = 0; rank < case_.ep_size; ++rank) {
      const FaultRecord& fault = ops_.group().fault(rank);
      EXPECT_EQ(fault.code, 0) << "rank " << rank << ", peer " << fault.peer << ", expected "
                               << fault.expected << ", seen " << fault.seen;
    }
  }

 private:
  void FindTokenRows(int32_t rank, Places& places) {
    int64_t token_row = 0;
    for (int32_t source = 0; source < case_.ep_size; ++source) {
      int32_t num_rows = 0;
      for (int32_t token = 0; token < case_.num_tokens; ++token) {
        if (!GoesTo(rank, source, token)) continue;
        for (int32_t k = 0; k < kTopK; ++k) {
          const int32_t i = token * kTopK + k;
          const int32_t expert = ops_.of(source).idx[i];
          if (expert >= 0 && expert / kLocalExperts == rank) places[source][i] = {rank, token_row};
        }
        ++token_row;
        ++num_rows;
      }
      EXPECT_EQ(ops_.of(rank).num_rows_from[source], num_rows);
    }
  }

  void CheckGroups(int32_t rank, const std::vector<Floats>& x, Places& places) {
    const Arrays& got = ops_.of(rank);
    int64_t next = 0;
    int64_t dropped = 0;
    for (int32_t expert = 0; expert < kLocalExperts; ++expert) {
      int32_t in_group = 0;
      for (int32_t source = 0; source < case_.ep_size; ++source) {
        const Arrays& from = ops_.of(source);
        for (int32_t i = 0; i < case_.num_tokens * kTopK; ++i) {
          if (from.idx[i] != rank * kLocalExperts + expert) continue;
          if (in_group++ >= got.group_sizes[expert]) {
            ++dropped;
            continue;
          }
          const float* want = x[source].data() + int64_t{i} / kTopK * case_.hidden;
          for (int32_t h = 0; h < case_.hidden; ++h) {
            ASSERT_EQ(got.rows[next * case_.hidden + h], want[h]) << rank << ", row " << next;
          }
          EXPECT_EQ(got.row_weights[next], from.weights[i]);
          places[source][i].row = next++;
        }
      }
      EXPECT_EQ(got.counts[expert], in_group);
    }
    EXPECT_EQ(got.dropped, dropped);
    for (size_t i = next * case_.hidden; i < got.rows.size(); ++i) ASSERT_EQ(got.rows[i], 0);
  }

  const Case& case_;
  Ops& ops_;
};

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

std::string NameOf(const testing::TestParamInfo<Case>& info) {
  const Case& which = info.param;
  static constexpr const char* kRoutings[] = {"Anywhere", "Everywhere", "NearlyEverywhere",
                                              "ToFirstRank", "Nowhere"};
  return std::to_string(which.ep_size) + "Ranks" + std::to_string(which.num_tokens) + "Tokens" +
         std::to_string(which.hidden) + kRoutings[static_cast<int>(which.routing)] +
         (which.recv_capacity >= 0 ? "Cut" + std::to_string(which.recv_capacity) : "") +
         (which.held_up ? "HeldUp" : "") +
         (which.wire_format == WireFormat::kPlain ? "" : "Float8") +
         (which.num_nodes == 1 ? ""
                               : "Nodes" + std::to_string(which.num_nodes) + "Stride" +
                                     std::to_string(which.node_stride));
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

constexpr Case InTiers(Case which, int32_t num_nodes, int32_t node_stride) {
  which.num_nodes = num_nodes;
  which.node_stride = node_stride;
  return which;
}

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
  const int64_t num_copied = GetParam().held_up ? 0 : 3 * 2;
  EXPECT_EQ(ops.group().num_first_parts(), num_copied);
  EXPECT_EQ(ops.group().num_last_parts(), num_copied);
}

// Where copies are held up, messages are unpacked turn by turn.
INSTANTIATE_TEST_SUITE_P(All, KernelsInPartsTest,
                         testing::Values(Case{3, 300, 4096},
                                         Case{3, 300, 4096, Routing::kEverywhere},
                                         Case{3, 300, 4096, Routing::kNearlyEverywhere},
                                         Case{3, 300, 4096, Routing::kAnywhere, -1, true},
                                         Case{3, 300, 4096, Routing::kNearlyEverywhere, -1, true}),
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
