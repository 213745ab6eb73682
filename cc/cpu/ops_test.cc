#include "cc/cpu/ops.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <memory>
#include <optional>
#include <vector>

#include "cc/cpu/ops_testing.h"
#include "cc/cpu/testing.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using testing::Awaited;
using testing::BufferOf;
using testing::CallOf;
using testing::ConfigFor;
using testing::Decode;
using testing::Describe;
using testing::Encode;
using testing::Expert;
using testing::kMatrix;
using testing::Layer;
using testing::OnEveryRank;
using testing::Placement;
using testing::PlacementOf;
using testing::Poisoned;
using testing::Random;
using testing::Received;
using testing::Rounded;
using testing::Source;
using testing::SourcesOf;
using testing::Token;
using testing::Visits;

// What `rank` gets back for its tokens by the contract.
std::vector<std::byte> ExpectedSums(const Config& config, const std::vector<Source>& sources,
                                    int32_t rank) {
  std::vector<Placement> placements;
  placements.reserve(config.ep_size);
  for (int32_t r = 0; r < config.ep_size; ++r) {
    placements.push_back(PlacementOf(config, sources, r));
  }
  const Source& source = sources[rank];
  const auto x = Decode(kMatrix.dtype, source.values.data(), source.num_tokens * kMatrix.hidden);
  std::vector<float> sums(x.size(), 0.0F);
  for (size_t element = 0; element < x.size(); ++element) {
    const int64_t token = static_cast<int64_t>(element) / kMatrix.hidden;
    for (int32_t r = 0; r < config.ep_size; ++r) {
      float of_rank = 0;
      for (int32_t k = 0; k < config.top_k; ++k) {
        if (placements[r].Find(rank, token, k) < 0) continue;
        const int64_t entry = token * config.top_k + k;
        of_rank += source.weights[entry] * Expert(source.idx[entry], x[element]);
      }
      sums[element] += Rounded(kMatrix.dtype, of_rank);
    }
  }
  return Encode(kMatrix.dtype, sums);
}

// Runs two layers at once. The order of their ops differs from rank to rank and from round to
// round; only ops that depend on each other are in order.
void RunTwoLayers(const std::shared_ptr<HostBuffer>& buffer, int32_t rank, int64_t round) {
  const Config& config = buffer->config();
  Random random(1000 * round + rank);
  const std::array sources{SourcesOf(config, 2 * round), SourcesOf(config, 2 * round + 1)};
  const int64_t run = round / 8;  // a program may pass a call site many times
  std::array layers{Layer(buffer, rank, run, 0), Layer(buffer, rank, run, 1)};
  std::array<std::vector<std::byte>, 2> sums;
  std::array<int, 2> steps{};
  while (steps[0] < 4 || steps[1] < 4) {
    int which = random.Below(2);
    // A recv blocks in this test, so it must not come before a send that other ranks wait for.
    const bool blocks = steps[which] % 2 == 1;
    const bool behind = steps[1 - which] < steps[which];
    if (steps[which] == 4 || (blocks && behind)) which = 1 - which;
    const Source& source = sources[which][rank];
    std::optional<Fault> fault;
    switch (steps[which]++) {
      case 0:
        fault = layers[which].SendDispatch(source);
        break;
      case 1:
        fault = layers[which].ReceiveDispatch();
        break;
      case 2:
        fault = layers[which].SendCombine();
        break;
      default:
        fault = layers[which].ReceiveCombine(source, sums[which]);
    }
    ASSERT_EQ(Describe(fault), "");
  }
  for (int i = 0; i < 2; ++i) ASSERT_EQ(sums[i], ExpectedSums(config, sources[i], rank));
}

class RoundTest : public ::testing::TestWithParam<int32_t> {};

INSTANTIATE_TEST_SUITE_P(EpSize, RoundTest, ::testing::Values(1, 2, 4, 8));

TEST_P(RoundTest, TwoLayersInFlightManyTimes) {
  const auto buffer = BufferOf(ConfigFor(GetParam()));
  OnEveryRank(GetParam(), [&](int32_t rank) {
    for (int64_t round = 0; round < 100; ++round) {
      ASSERT_NO_FATAL_FAILURE(RunTwoLayers(buffer, rank, round)) << "round " << round;
    }
  });
  EXPECT_EQ(buffer->TakeFault(), std::nullopt);
}

TEST_P(RoundTest, MemoryIsThatOfTheExchangesInFlight) {
  const Config config = ConfigFor(GetParam());
  const auto buffer = BufferOf(config);
  OnEveryRank(GetParam(), [&](int32_t rank) {
    for (int64_t round = 0; round < 50; ++round) RunTwoLayers(buffer, rank, round);
  });
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    // Bounds the messages of dispatches and combines. Other ranks may hold messages longer than
    // their sender knows.
    EXPECT_LE(buffer->MessageBytes(rank),
              int64_t{2} * 2 * config.num_slots * config.ep_size * MaxMessageBytes(config));
  }
}

// ------------------------------------------------------------------------------------- backward

// The gradient that `rank` sends for the weight of (token, k).
float GradOf(int32_t rank, int64_t token, int32_t k) {
  return static_cast<float>(int64_t{1000} * rank + 10 * token + k);
}

// The token rows that `rank` received, as a layout with one row each, and a gradient for each
// weight.
struct TokenRows {
  std::vector<int32_t> rows, num_rows_from;
  std::vector<float> weight_grads;
};

TokenRows TokenRowsOf(const Config& config, const std::vector<Source>& sources, int32_t rank) {
  TokenRows made;
  for (const Source& source : sources) {
    made.num_rows_from.push_back(0);
    for (int64_t t = 0; t < source.num_tokens; ++t) {
      if (!Visits(config, source, t, rank)) continue;
      ++made.num_rows_from.back();
      made.rows.push_back(static_cast<int32_t>(made.rows.size()));
      for (int32_t k = 0; k < config.top_k; ++k) made.weight_grads.push_back(GradOf(rank, t, k));
    }
  }
  made.rows.resize(config.max_recv_tokens(), -1);
  made.weight_grads.resize(config.max_recv_tokens() * config.top_k);
  return made;
}

// Every rank sends back ones, so the sum of a token is the number of ranks that it went to.
void ExpectGradients(const Config& config, const Source& source, const std::vector<float>& sums,
                     const std::vector<float>& weight_grads) {
  for (int64_t t = 0; t < source.num_tokens; ++t) {
    int ranks = 0;
    for (int32_t r = 0; r < config.ep_size; ++r) ranks += Visits(config, source, t, r) ? 1 : 0;
    EXPECT_EQ(sums[t * kMatrix.hidden], static_cast<float>(ranks));
    for (int32_t k = 0; k < config.top_k; ++k) {
      const int64_t entry = t * config.top_k + k;
      const int32_t expert = source.idx[entry];
      const int32_t owner = expert / config.num_local_experts();
      EXPECT_EQ(weight_grads[entry], expert < 0 ? 0.0F : GradOf(owner, t, k));
    }
  }
}

TEST(BackwardTest, DispatchBackwardBringsGradientsToTheirTokens) {
  const Config config = ConfigFor(4);
  const auto buffer = BufferOf(config);
  const std::vector<Source> sources = SourcesOf(config, 1);
  const std::vector<float> ones(config.max_recv_tokens() * kMatrix.hidden, 1.0F);
  const std::vector<std::byte> x_grad = Encode(kMatrix.dtype, ones);
  OnEveryRank(config.ep_size, [&](int32_t rank) {
    const Source& source = sources[rank];
    const TokenRows token_rows = TokenRowsOf(config, sources, rank);
    const LayoutIn layout{token_rows.rows.data(), token_rows.num_rows_from.data(), 1,
                          config.max_recv_tokens()};
    const SumsIn in{.matrix = kMatrix,
                    .rows = {.y = x_grad.data(), .layout = layout},
                    .weight_grads = token_rows.weight_grads.data()};
    Token token{};
    const HostCall send = CallOf(Op::kDispatchBackwardSend, buffer, rank, 1);
    ASSERT_EQ(Describe(SendSums(send, in, token.data())), "");

    auto out = Poisoned<std::byte>(source.num_tokens * kMatrix.row_bytes());
    auto weight_grads = Poisoned<float>(source.num_tokens * config.top_k);
    const SumsOut received{kMatrix, source.topk(), out.data(), weight_grads.data()};
    const auto fault = Awaited(
        CallOf(Op::kDispatchBackwardRecv, buffer, rank, 1),
        [&](const HostCall& recv) { ReceiveSums(recv, token.data(), std::nullopt, received); });
    ASSERT_EQ(Describe(fault), "");
    const auto sums = Decode(kMatrix.dtype, out.data(), source.num_tokens * kMatrix.hidden);
    ExpectGradients(config, source, sums, weight_grads);
  });
}

TEST(BackwardTest, CombineBackwardSendsATokensGradientToEveryRankOfItsExperts) {
  const Config config = ConfigFor(4);
  const auto buffer = BufferOf(config);
  const std::vector<Source> sources = SourcesOf(config, 2);
  OnEveryRank(config.ep_size, [&](int32_t rank) {
    Token token{};
    ASSERT_EQ(
        Describe(CombineBackwardSend(CallOf(Op::kCombineBackwardSend, buffer, rank, 1),
                                     {sources[rank].topk(), sources[rank].rows()}, token.data())),
        "");
    const auto unpack = [&](const Config&, const std::vector<Message>& messages) {
      for (int32_t s = 0; s < config.ep_size; ++s) {
        int64_t row = 0;
        for (int64_t t = 0; t < sources[s].num_tokens; ++t) {
          if (!Visits(config, sources[s], t, rank)) continue;
          const std::byte* sent = sources[s].values.data() + t * kMatrix.row_bytes();
          EXPECT_TRUE(std::equal(sent, sent + kMatrix.row_bytes(), messages[s].row(row++)));
        }
        EXPECT_EQ(messages[s].header().num_rows, row);
      }
      return std::optional<Fault>();
    };
    EXPECT_EQ(Describe(Received(CallOf(Op::kCombineBackwardRecv, buffer, rank, 1), token, unpack)),
              "");
  });
}

}  // namespace
}  // namespace jax_sm_free
