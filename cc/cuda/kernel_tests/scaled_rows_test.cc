// Rows with scales: a dispatch brings both parts of each row, as they were sent.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "cc/cuda/kernel_tests/checker.h"
#include "cc/cuda/kernel_tests/memory.h"
#include "cc/cuda/kernel_tests/ops.h"
#include "gtest/gtest.h"

namespace jax_sm_free::cuda::kernel_tests {
namespace {

using Bytes = Array<std::byte>;

struct ScaledCase {
  Case which;
  int64_t values_bytes;
  int64_t scales_bytes;
};

// Rows of one rank.
struct Parts {
  Bytes values;
  Bytes scales;
};

class ScaledRowsTest : public testing::TestWithParam<ScaledCase> {
 protected:
  ConstRows RowsOf(const Parts& parts) const {
    return {parts.values.data(), GetParam().values_bytes, parts.scales.data(),
            GetParam().scales_bytes};
  }
  Parts MakeParts(int64_t num_rows) {
    Parts parts{Bytes(num_rows * GetParam().values_bytes),
                Bytes(num_rows * GetParam().scales_bytes)};
    for (Bytes* bytes : {&parts.values, &parts.scales}) {
      for (std::byte& byte : *bytes) byte = static_cast<std::byte>(random_());
    }
    return parts;
  }

  void Send(int32_t rank, const Parts& parts) {
    Arrays& a = ops.of(rank);
    DispatchSend(ops.CallOf(Op::kDispatchSend, rank),
                 {.position = &a.position,
                  .topk = {a.idx.data(), a.weights.data(), which.num_tokens},
                  .rows = RowsOf(parts)},
                 a.token.data());
  }
  Parts Receive(int32_t rank, const Parts& sent) {
    Arrays& a = ops.of(rank);
    Parts got = MakeParts(ops.config().recv_capacity);
    DispatchRecv(ops.CallOf(Op::kDispatchRecv, rank), a.token.data(),
                 {RowsOf(sent), which.num_tokens},
                 {.rows = {got.values.data(), GetParam().values_bytes, got.scales.data(),
                           GetParam().scales_bytes},
                  .group_sizes = a.group_sizes.data(),
                  .counts = a.counts.data(),
                  .weights = a.row_weights.data(),
                  .dropped = &a.dropped,
                  .layout = {a.layout_rows.data(), a.num_rows_from.data()}});
    AwaitKernels();
    return got;
  }

  const Case& which = GetParam().which;
  Ops ops{which};
  Checker checker{which, ops};

 private:
  std::mt19937 random_{3};
};

// Whether row i of one array is row j of the other.
bool IsSame(const Bytes& rows, int64_t i, const Bytes& others, int64_t j, int64_t bytes) {
  return std::equal(rows.begin() + i * bytes, rows.begin() + (i + 1) * bytes,
                    others.begin() + j * bytes);
}

TEST_P(ScaledRowsTest, BothPartsArrive) {
  ops.Dispatch();
  const Places places = checker.CheckDispatch();
  std::vector<Parts> sent;
  std::vector<Parts> got;
  got.reserve(which.ep_size);
  for (int32_t rank = 0; rank < which.ep_size; ++rank) {
    Send(rank, sent.emplace_back(MakeParts(which.num_tokens)));
  }
  ops.Move();
  ops.ForwardAll(Op::kDispatchForward);
  for (int32_t rank = 0; rank < which.ep_size; ++rank) got.push_back(Receive(rank, sent[rank]));
  for (int32_t source = 0; source < which.ep_size; ++source) {
    for (int32_t i = 0; i < which.num_tokens * kTopK; ++i) {
      const Place& place = places[source][i];
      if (place.row < 0) continue;
      const Parts& there = got[place.rank];
      ASSERT_TRUE(
          IsSame(there.values, place.row, sent[source].values, i / kTopK, GetParam().values_bytes));
      ASSERT_TRUE(
          IsSame(there.scales, place.row, sent[source].scales, i / kTopK, GetParam().scales_bytes));
    }
  }
  checker.ExpectNoFault();
}

INSTANTIATE_TEST_SUITE_P(All, ScaledRowsTest,
                         testing::Values(ScaledCase{{3, 40, 1300}, 4608, 144},
                                         ScaledCase{{3, 40, 600}, 2048, 64},
                                         ScaledCase{{3, 40, 600}, 2048, 20},
                                         ScaledCase{{2, 40, 16}, 30, 5},
                                         ScaledCase{InTiers({4, 40, 1300}, 2, 2), 4608, 144},
                                         ScaledCase{InTiers({4, 40, 600}, 2, 1), 2000, 36},
                                         ScaledCase{InTiers({4, 40, 16}, 2, 2), 30, 5}),
                         [](const auto& info) { return "Case" + std::to_string(info.index); });

}  // namespace
}  // namespace jax_sm_free::cuda::kernel_tests
