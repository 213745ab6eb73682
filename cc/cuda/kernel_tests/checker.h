// Compares what a dispatch and sums of its rows give with loops over all choices of all tokens.

#ifndef JAX_SM_FREE_CC_CUDA_KERNEL_TESTS_CHECKER_H_
#define JAX_SM_FREE_CC_CUDA_KERNEL_TESTS_CHECKER_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cc/cpu/wire_rows.h"
#include "cc/cuda/kernel_tests/ops.h"
#include "gtest/gtest.h"

namespace jax_sm_free::cuda::kernel_tests {

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

// The name of a test case.
inline std::string NameOf(const testing::TestParamInfo<Case>& info) {
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

// The same case with several nodes.
constexpr Case InTiers(Case which, int32_t num_nodes, int32_t node_stride) {
  which.num_nodes = num_nodes;
  which.node_stride = node_stride;
  return which;
}

}  // namespace jax_sm_free::cuda::kernel_tests

#endif  // JAX_SM_FREE_CC_CUDA_KERNEL_TESTS_CHECKER_H_
