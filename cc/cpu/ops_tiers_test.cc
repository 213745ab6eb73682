#include <array>
#include <cstddef>
#include <latch>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cc/cpu/ops.h"
#include "cc/cpu/ops_testing.h"
#include "cc/cpu/testing.h"
#include "cc/tiers.h"
#include "cc/tiers_testing.h"
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
using ::testing::IsSubstring;
using testing::kMatrix;
using testing::Layer;
using testing::Nodes;
using testing::OnEveryRank;
using testing::Placement;
using testing::PlacementOf;
using testing::Poisoned;
using testing::Random;
using testing::Rounded;
using testing::Source;
using testing::SourcesOf;
using testing::Token;

class TiersTest : public ::testing::TestWithParam<Nodes> {
 protected:
  Config config_ = GetParam().AddTo(ConfigFor(GetParam().ep_size()));
  std::shared_ptr<HostBuffer> buffer_ = BufferOf(config_);
  std::shared_ptr<HostBuffer> flat_buffer_ = BufferOf(ConfigFor(config_.ep_size));
};

INSTANTIATE_TEST_SUITE_P(All, TiersTest,
                         ::testing::Values(Nodes{2, 2, 2}, Nodes{2, 2, 1}, Nodes{2, 3, 3},
                                           Nodes{2, 3, 1}, Nodes{3, 2, 2}, Nodes{3, 1, 1}));

// The results of a rank by the contract: sums over k, cast; over the ranks of a node in their
// order, cast; over nodes in their order, cast.
std::vector<std::byte> ExpectedSums(const Config& config, const std::vector<Source>& sources,
                                    int32_t rank) {
  std::vector<Placement> placements;
  placements.reserve(config.ep_size);
  for (int32_t r = 0; r < config.ep_size; ++r) {
    placements.push_back(PlacementOf(config, sources, r));
  }
  const Source& source = sources[rank];
  const auto x = Decode(kMatrix.dtype, source.values.data(), source.num_tokens * kMatrix.hidden);
  const auto of_rank = [&](int32_t r, int64_t token, float value) {
    float sum = 0;
    for (int32_t k = 0; k < config.top_k; ++k) {
      if (placements[r].Find(rank, token, k) < 0) continue;
      const int64_t entry = token * config.top_k + k;
      sum += source.weights[entry] * Expert(source.idx[entry], value);
    }
    return Rounded(kMatrix.dtype, sum);
  };
  std::vector<float> sums(x.size(), 0.0F);
  for (size_t element = 0; element < x.size(); ++element) {
    const int64_t token = static_cast<int64_t>(element) / kMatrix.hidden;
    for (int32_t node = 0; node < config.num_nodes; ++node) {
      float of_node = 0;
      for (int32_t place = 0; place < config.node_size(); ++place) {
        of_node += of_rank(RankAt(config, node, place), token, x[element]);
      }
      sums[element] += Rounded(kMatrix.dtype, of_node);
    }
  }
  return Encode(kMatrix.dtype, sums);
}

// One step of a layer: 0 to 5.
std::optional<Fault> Step(Layer& layer, int step, const Source& source,
                          std::vector<std::byte>& sums) {
  switch (step) {
    case 0:
      return layer.SendDispatch(source);
    case 1:
      return layer.ForwardDispatch();
    case 2:
      return layer.ReceiveDispatch();
    case 3:
      return layer.SendCombine();
    case 4:
      return layer.ForwardCombine();
    default:
      return layer.ReceiveCombine(source, sums);
  }
}

// Runs two layers at once. The order of their ops differs from rank to rank and from round to
// round. A forward or a recv blocks here, so it does not come before a step of the other layer that
// other ranks wait for.
void RunTwoLayers(const std::shared_ptr<HostBuffer>& buffer, int32_t rank, int64_t round) {
  const Config& config = buffer->config();
  Random random(1000 * round + rank);
  const std::array sources{SourcesOf(config, 2 * round), SourcesOf(config, 2 * round + 1)};
  const int64_t run = round / 8;  // a program may pass a call site many times
  std::array layers{Layer(buffer, rank, run, 0), Layer(buffer, rank, run, 1)};
  std::array<std::vector<std::byte>, 2> sums;
  std::array<int, 2> steps{};
  while (steps[0] < 6 || steps[1] < 6) {
    int which = random.Below(2);
    const bool blocks = steps[which] % 3 != 0;
    if (steps[which] == 6 || (blocks && steps[1 - which] < steps[which])) which = 1 - which;
    ASSERT_EQ(Describe(Step(layers[which], steps[which]++, sources[which][rank], sums[which])), "");
  }
  for (int i = 0; i < 2; ++i) ASSERT_EQ(sums[i], ExpectedSums(config, sources[i], rank));
}

TEST_P(TiersTest, TwoLayersInFlightManyTimes) {
  OnEveryRank(config_.ep_size, [&](int32_t rank) {
    for (int64_t round = 0; round < 50; ++round) {
      ASSERT_NO_FATAL_FAILURE(RunTwoLayers(buffer_, rank, round)) << "round " << round;
    }
  });
  EXPECT_EQ(buffer_->TakeFault(), std::nullopt);
}

// ------------------------------------------------------------------ the same as in one tier

// The gradient of a combine.
struct YGrad {
  std::vector<std::byte> y_grad;
  std::vector<float> weight_grads;

  bool operator==(const YGrad&) const = default;
};

YGrad CombineBackward(const std::shared_ptr<HostBuffer>& buffer, int32_t rank, const Layer& layer,
                      const Source& out_grad) {
  const Config& config = buffer->config();
  const HostCall send = CallOf(Op::kCombineBackwardSend, buffer, rank, 1);
  Token token{};
  EXPECT_EQ(Describe(CombineBackwardSend(send, {out_grad.topk(), out_grad.rows()}, token.data())),
            "");
  if (config.has_two_tiers()) {
    const HostCall forward = CallOf(Op::kCombineBackwardForward, buffer, rank, 1);
    EXPECT_EQ(Describe(Awaited(forward,
                               [&](const HostCall& call) {
                                 CombineBackwardForward(call, token.data(),
                                                        {layer.node_topk().data()}, token.data());
                               })),
              "");
  }
  YGrad grad{Poisoned<std::byte>(config.recv_capacity * kMatrix.row_bytes()),
             Poisoned<float>(config.recv_capacity)};
  const SpreadOut out{kMatrix,
                      {layer.values().data(), layer.weights().data(), layer.layout()},
                      grad.y_grad.data(),
                      grad.weight_grads.data()};
  EXPECT_EQ(Describe(Awaited(
                CallOf(Op::kCombineBackwardRecv, buffer, rank, 1),
                [&](const HostCall& call) { CombineBackwardRecv(call, token.data(), out); })),
            "");
  return grad;
}

// The gradient of a dispatch.
struct XGrad {
  std::vector<std::byte> x_grad;
  std::vector<float> weight_grads;

  bool operator==(const XGrad&) const = default;
};

XGrad DispatchBackward(const std::shared_ptr<HostBuffer>& buffer, int32_t rank, const Layer& layer,
                       const Source& source) {
  const Config& config = buffer->config();
  Random random(rank);
  // All sums of these are exact, in whatever order.
  std::vector<float> rows(config.recv_capacity * kMatrix.hidden);
  for (float& value : rows) value = static_cast<float>(random.Below(4));
  const std::vector<std::byte> recv_grad = Encode(kMatrix.dtype, rows);
  std::vector<float> weight_grads(config.max_recv_tokens() * config.top_k);
  for (float& value : weight_grads) value = random.Normal();
  const SumsIn in{.matrix = kMatrix,
                  .rows = {.y = recv_grad.data(), .layout = layer.layout()},
                  .weight_grads = weight_grads.data()};
  Token token{};
  EXPECT_EQ(
      Describe(SendSums(CallOf(Op::kDispatchBackwardSend, buffer, rank, 1), in, token.data())), "");
  if (config.has_two_tiers()) {
    EXPECT_EQ(Describe(Awaited(CallOf(Op::kDispatchBackwardForward, buffer, rank, 1),
                               [&](const HostCall& call) {
                                 ForwardSums(call, token.data(), {layer.node_topk().data()},
                                             token.data());
                               })),
              "");
  }
  XGrad grad{Poisoned<std::byte>(source.num_tokens * kMatrix.row_bytes()),
             Poisoned<float>(source.num_tokens * config.top_k)};
  const SumsOut out{kMatrix, source.topk(), grad.x_grad.data(), grad.weight_grads.data()};
  EXPECT_EQ(Describe(Awaited(
                CallOf(Op::kDispatchBackwardRecv, buffer, rank, 1),
                [&](const HostCall& call) { ReceiveSums(call, token.data(), std::nullopt, out); })),
            "");
  return grad;
}

TEST_P(TiersTest, DispatchAndBothGradientsAreThoseOfOneTier) {
  for (int64_t seed = 1; seed < 6; ++seed) {
    const std::vector<Source> sources = SourcesOf(config_, seed);
    OnEveryRank(config_.ep_size, [&](int32_t rank) {
      const Source& source = sources[rank];
      Layer tiers(buffer_, rank, seed, 0);
      Layer flat(flat_buffer_, rank, seed, 0);
      ASSERT_EQ(Describe(tiers.SendDispatch(source)), "");
      ASSERT_EQ(Describe(tiers.ForwardDispatch()), "");
      ASSERT_EQ(Describe(tiers.ReceiveDispatch()), "");
      ASSERT_EQ(Describe(flat.SendDispatch(source)), "");
      ASSERT_EQ(Describe(flat.ReceiveDispatch()), "");
      EXPECT_TRUE(tiers.dispatched() == flat.dispatched());
      EXPECT_TRUE(CombineBackward(buffer_, rank, tiers, source) ==
                  CombineBackward(flat_buffer_, rank, flat, source));
      EXPECT_TRUE(DispatchBackward(buffer_, rank, tiers, source) ==
                  DispatchBackward(flat_buffer_, rank, flat, source));
    });
  }
  EXPECT_EQ(buffer_->TakeFault(), std::nullopt);
}

// ------------------------------------------------------------------------------------- faults

class TiersFaultsTest : public ::testing::Test {
 protected:
  void Open(double timeout_s) {
    config_.timeout_s = timeout_s;
    buffer_ = BufferOf(config_);
  }

  Config config_ = Nodes{2, 2, 2}.AddTo(ConfigFor(4));
  std::shared_ptr<HostBuffer> buffer_ = BufferOf(config_);
  std::vector<Source> sources_ = SourcesOf(config_, 1);
};

TEST_F(TiersFaultsTest, ARecvWithoutAForwardEndsTheRun) {
  Layer layer(buffer_, 0, 1, 0);
  ASSERT_EQ(Describe(layer.SendDispatch(sources_[0])), "");
  EXPECT_PRED_FORMAT2(IsSubstring,
                      "dispatch_recv on rank 0 of node 0: ", Describe(layer.ReceiveDispatch()));
}

TEST_F(TiersFaultsTest, ASecondForwardEndsTheRun) {
  std::latch forwarded(config_.ep_size);
  OnEveryRank(config_.ep_size, [&](int32_t rank) {
    Layer layer(buffer_, rank, 1, 0);
    EXPECT_EQ(Describe(layer.SendDispatch(sources_[rank])), "");
    EXPECT_EQ(Describe(layer.ForwardDispatch()), "");
    forwarded.arrive_and_wait();
    if (rank != 3) return;
    EXPECT_PRED_FORMAT2(
        IsSubstring, "dispatch_forward on rank 3 of node 1: ", Describe(layer.ForwardDispatch()));
  });
  EXPECT_PRED_FORMAT2(IsSubstring,
                      "dispatch_forward on rank 3 of node 1: ", buffer_->TakeFault().value_or(""));
}

TEST_F(TiersFaultsTest, ARankThatNeverSendsIsNamedByItsRailPeers) {
  Open(0.1);
  OnEveryRank(config_.ep_size - 1, [&](int32_t rank) {
    Layer layer(buffer_, rank, 1, 0);
    EXPECT_EQ(Describe(layer.SendDispatch(sources_[rank])), "");
    if (rank != 1) return;
    EXPECT_PRED_FORMAT2(IsSubstring,
                        "dispatch_forward on rank 1 of node 0, peer rank 3 of node 1: ",
                        Describe(layer.ForwardDispatch()));
  });
}

TEST_F(TiersFaultsTest, ARankThatNeverForwardsIsNamedByTheRanksOfItsNode) {
  Open(0.2);
  std::latch forwarded(config_.ep_size - 1);
  OnEveryRank(config_.ep_size, [&](int32_t rank) {
    Layer layer(buffer_, rank, 1, 0);
    EXPECT_EQ(Describe(layer.SendDispatch(sources_[rank])), "");
    if (rank == 3) return;
    EXPECT_EQ(Describe(layer.ForwardDispatch()), "");
    forwarded.arrive_and_wait();
    if (rank != 2) return;
    EXPECT_PRED_FORMAT2(IsSubstring, "dispatch_recv on rank 2 of node 1, peer rank 3 of node 1: ",
                        Describe(layer.ReceiveDispatch()));
  });
}

TEST_F(TiersFaultsTest, AnIndexOutOfRangeOnOneNodeEndsAllRanks) {
  Random random(3);
  sources_[2] = testing::RandomSource(config_, 5, kMatrix.row_bytes(), 0, random);
  sources_[2].idx[4] = config_.num_experts;
  OnEveryRank(config_.ep_size, [&](int32_t rank) {
    Layer layer(buffer_, rank, 1, 0);
    std::optional<Fault> fault = layer.SendDispatch(sources_[rank]);
    if (!fault) fault = layer.ForwardDispatch();
    EXPECT_PRED_FORMAT2(IsSubstring, "8 at token 1, k 1", Describe(fault));
  });
  EXPECT_PRED_FORMAT2(IsSubstring,
                      "dispatch_send on rank 2 of node 1: ", buffer_->TakeFault().value_or(""));
}

TEST_F(TiersFaultsTest, MoreSendsThanSlotsEndTheRun) {
  Layer layer(buffer_, 1, 1, 0);
  for (int32_t i = 0; i < config_.num_slots; ++i) {
    ASSERT_EQ(Describe(layer.SendDispatch(sources_[1])), "");
  }
  const std::string seen = Describe(layer.SendDispatch(sources_[1]));
  EXPECT_PRED_FORMAT2(IsSubstring, "dispatch_send on rank 1 of node 0: ", seen);
  EXPECT_PRED_FORMAT2(IsSubstring, "one send more without a recv", seen);
}

}  // namespace
}  // namespace jax_sm_free
