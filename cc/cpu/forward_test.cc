#include "cc/cpu/forward.h"

#include <algorithm>
#include <cstddef>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "cc/cpu/pack.h"
#include "cc/cpu/testing.h"
#include "cc/routing.h"
#include "cc/tiers.h"
#include "cc/tiers_testing.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

// RoutingOnNode of indices that all are experts or -1.
std::vector<int32_t> RoutingOf(const Config& config, int32_t node, const TopK& topk) {
  Result<std::vector<int32_t>> routing = RoutingOnNode(config, node, topk);
  EXPECT_EQ(FaultOf(routing), nullptr);
  return FaultOf(routing) == nullptr ? std::get<0>(std::move(routing)) : std::vector<int32_t>();
}

using testing::Decode;
using testing::Encode;
using testing::Nodes;
using testing::PoisonedPool;
using testing::Random;
using testing::RandomSource;
using testing::RandomSources;
using testing::Rounded;
using testing::Source;
using testing::Visits;

constexpr Matrix kMatrix{.dtype = DType::kBFloat16, .hidden = 5};

class ForwardTest : public ::testing::TestWithParam<Nodes> {
 protected:
  const Config config_ = GetParam().AddTo({.num_experts = 3 * GetParam().ep_size(),
                                           .top_k = 4,
                                           .max_tokens = 9,
                                           .row_bytes = kMatrix.row_bytes(),
                                           .dtype = kMatrix.dtype});
  const Config rail_ = RailConfig(config_);
  const Config node_ = NodeConfig(config_);
  Random random_;
  BlockPool pool_ = PoisonedPool(config_);
  BlockPool rail_pool_ = PoisonedPool(rail_);

  bool IsOnNode(int32_t expert, int32_t node) const {
    return expert >= 0 && NodeOf(config_, OwnerRank(expert, config_.num_local_experts())) == node;
  }

  // Of an expert of any node: its number among the experts of that node.
  int32_t NodeExpert(int32_t expert) const {
    const int32_t num_local = config_.num_local_experts();
    return PlaceInNode(config_, OwnerRank(expert, num_local)) * num_local +
           LocalExpert(expert, num_local);
  }

  Message RailMessage(const Source& source, int32_t node) {
    const std::vector<int32_t> sorted = SortByNode(config_, source.topk());
    const TopK topk{sorted.data(), source.weights.data(), source.num_tokens};
    const auto route = std::get<Route>(Route::Make(rail_, topk));
    return PackDispatch(rail_, route.tokens(node), topk, node, source.rows(), rail_pool_.Take());
  }

  Message FlatMessage(const Source& source, int32_t dst) {
    const auto route = std::get<Route>(Route::Make(config_, source.topk()));
    return PackDispatch(config_, route.tokens(dst), source.topk(), dst, source.rows(),
                        pool_.Take());
  }

  // The rows of the rail message that go to each place, by the way of node_topk.
  Route RouteWithinNode(const Message& rail, int32_t from_node) {
    node_topk_.assign(int64_t{config_.num_nodes} * config_.max_tokens * config_.top_k, 99);
    WriteNodeTopK(config_, from_node, &rail, node_topk_.data());
    return std::get<Route>(
        Route::Make(node_, std::get<TopK>(RailRows(config_, from_node, node_topk_.data()))));
  }

  std::vector<int32_t> node_topk_;
};

INSTANTIATE_TEST_SUITE_P(All, ForwardTest,
                         ::testing::Values(Nodes{2, 2, 2}, Nodes{2, 2, 1}, Nodes{2, 3, 3},
                                           Nodes{2, 3, 1}, Nodes{3, 2, 2}, Nodes{2, 4, 2},
                                           Nodes{4, 1, 1}));

TEST_P(ForwardTest, SortingKeepsNumbersThatNameNoExpert) {
  Source source = RandomSource(config_, config_.max_tokens, 0, 0, random_);
  source.idx[1] = -1;
  source.idx[2] = -7;
  source.idx[3] = config_.num_experts;
  const std::vector<int32_t> sorted = SortByNode(config_, source.topk());
  ASSERT_EQ(sorted.size(), source.idx.size());
  for (size_t i = 0; i < sorted.size(); ++i) {
    const int32_t expert = source.idx[i];
    const bool exists = expert >= 0 && expert < config_.num_experts;
    EXPECT_EQ(sorted[i], exists ? SortedByNode(config_, expert) : expert);
  }
}

TEST_P(ForwardTest, RoutingOnNodeHasTheTokensThatHaveAnExpertThere) {
  const Source source = RandomSource(config_, config_.max_tokens, 0, 0, random_);
  for (int32_t node = 0; node < config_.num_nodes; ++node) {
    std::vector<int32_t> want;
    for (int64_t t = 0; t < source.num_tokens; ++t) {
      const auto* first = source.idx.data() + t * config_.top_k;
      const auto* last = first + config_.top_k;
      if (std::none_of(first, last, [&](int32_t e) { return IsOnNode(e, node); })) continue;
      std::transform(first, last, std::back_inserter(want),
                     [&](int32_t e) { return IsOnNode(e, node) ? NodeExpert(e) : -1; });
    }
    EXPECT_EQ(RoutingOf(config_, node, source.topk()), want);
  }
}

TEST_P(ForwardTest, NodeTopKHasTheRoutingOfEachRailMessage) {
  const int64_t block = int64_t{config_.max_tokens} * config_.top_k;
  std::vector<int32_t> node_topk(config_.num_nodes * block, 99);
  const int32_t here = config_.num_nodes - 1;
  std::vector<Source> sources;
  for (int32_t node = 0; node < config_.num_nodes; ++node) {
    // The first message is as long as a message may be.
    const int32_t num_tokens = node == 0 ? config_.max_tokens : random_.Below(config_.max_tokens);
    sources.push_back(RandomSource(config_, num_tokens, kMatrix.row_bytes(), 0, random_));
  }
  for (int32_t& expert : sources[0].idx) expert = RankAt(config_, here, 0) * 3;
  for (int32_t node = 0; node < here; ++node) {
    const Message rail = RailMessage(sources[node], here);
    WriteNodeTopK(config_, node, &rail, node_topk.data());
  }
  WriteNodeTopK(config_, here, nullptr, node_topk.data());

  for (int32_t node = 0; node < here; ++node) {
    std::vector<int32_t> want = RoutingOf(config_, here, sources[node].topk());
    const TopK rows = std::get<TopK>(RailRows(config_, node, node_topk.data()));
    EXPECT_EQ(rows.num_tokens * config_.top_k, static_cast<int64_t>(want.size()));
    EXPECT_EQ(rows.idx, node_topk.data() + node * block);
    want.resize(block, -1);
    EXPECT_TRUE(std::equal(want.begin(), want.end(), rows.idx)) << "node " << node;
  }
  EXPECT_EQ(std::get<TopK>(RailRows(config_, 0, node_topk.data())).num_tokens, config_.max_tokens);
  EXPECT_EQ(std::get<TopK>(RailRows(config_, here, node_topk.data())).num_tokens, 0);
  EXPECT_TRUE(std::all_of(node_topk.end() - block, node_topk.end(),
                          [](int32_t expert) { return expert == -1; }));
}

TEST_P(ForwardTest, AForwardedMessageIsTheFlatMessage) {
  for (const Source& source : RandomSources(config_, kMatrix.row_bytes(), 0, random_)) {
    for (int32_t dst = 0; dst < config_.ep_size; ++dst) {
      const int32_t place = PlaceInNode(config_, dst);
      const Message rail = RailMessage(source, NodeOf(config_, dst));
      const Route route = RouteWithinNode(rail, 0);
      const Message got = ForwardDispatch(config_, rail, route.tokens(place), place, pool_.Take());
      const Message want = FlatMessage(source, dst);
      const int32_t num_rows = want.header().num_rows;
      ASSERT_EQ(got.header().kind, want.header().kind);
      ASSERT_EQ(got.header().num_rows, num_rows);
      ASSERT_EQ(got.header().row_bytes, want.header().row_bytes);
      ASSERT_EQ(got.bytes().size(), want.bytes().size());
      const auto expect_equal = [](const auto* a, const auto* b, int64_t size) {
        EXPECT_TRUE(std::equal(a, a + size, b));
      };
      const int64_t num_entries = int64_t{num_rows} * config_.top_k;
      expect_equal(got.rows_per_expert(), want.rows_per_expert(), config_.num_local_experts());
      expect_equal(got.local_expert(), want.local_expert(), num_entries);
      expect_equal(got.position(), want.position(), num_entries);
      expect_equal(got.weight(), want.weight(), num_entries);
      for (int32_t i = 0; i < num_rows; ++i) {
        expect_equal(got.row(i), want.row(i), kMatrix.row_bytes());
      }
    }
  }
}

TEST_P(ForwardTest, ForwardedRowsAreThoseOfTheTokensThatGoToThePlace) {
  const Source source = RandomSource(config_, config_.max_tokens, kMatrix.row_bytes(), 0, random_);
  for (int32_t dst = 0; dst < config_.ep_size; ++dst) {
    const Message dispatched = RailMessage(source, NodeOf(config_, dst));
    const Route route = RouteWithinNode(dispatched, 0);
    std::vector<int32_t> on_node;
    for (int32_t t = 0; t < source.num_tokens; ++t) {
      const auto* first = source.idx.data() + int64_t{t} * config_.top_k;
      if (std::any_of(first, first + config_.top_k,
                      [&](int32_t e) { return IsOnNode(e, NodeOf(config_, dst)); })) {
        on_node.push_back(t);
      }
    }
    const Message rail =
        PackRows(rail_, Kind::kCombineBackward, on_node, source.rows(), rail_pool_.Take());
    const Message got =
        ForwardRows(config_, rail, route.tokens(PlaceInNode(config_, dst)), pool_.Take());
    EXPECT_EQ(got.header().kind, static_cast<int32_t>(Kind::kCombineBackward));
    int32_t row = 0;
    for (int64_t t = 0; t < source.num_tokens; ++t) {
      if (!Visits(config_, source, t, dst)) continue;
      const std::byte* want = source.values.data() + t * kMatrix.row_bytes();
      EXPECT_TRUE(std::equal(want, want + kMatrix.row_bytes(), got.row(row++)));
    }
    EXPECT_EQ(got.header().num_rows, row);
  }
}

// ------------------------------------------------------------------------------------------ sums

class SumsTest : public ForwardTest {
 protected:
  bool GoesTo(int64_t row, int32_t place) const {
    const auto* first = experts_.data() + row * config_.top_k;
    return std::any_of(first, first + config_.top_k, [&](int32_t expert) {
      return expert >= 0 && OwnerRank(expert, config_.num_local_experts()) == place;
    });
  }

  // What the ranks of a node have for `sums.rank`, by number. `values_` gets the values by place
  // and row, and `grads_` the gradients of weights.
  std::vector<Message> Make(const SumsFor& sums, Kind kind) {
    experts_ = RoutingOf(config_, NodeOf(config_, sums.rank),
                         RandomSource(config_, config_.max_tokens, 0, 0, random_).topk());
    std::vector<Message> messages(config_.ep_size);
    values_.assign(config_.node_size(), {});
    grads_.assign(config_.node_size(), {});
    for (int32_t place = 0; place < config_.node_size(); ++place) {
      int32_t num_rows = 0;
      for (int64_t row = 0; row < num_tokens(); ++row) num_rows += GoesTo(row, place) ? 1 : 0;
      Message message(pool_.Take(), config_,
                      {.kind = static_cast<int32_t>(kind),
                       .num_rows = num_rows,
                       .row_bytes = kMatrix.row_bytes()});
      for (int32_t i = 0; i < num_rows; ++i) {
        std::vector<float> row;
        for (int64_t h = 0; h < kMatrix.hidden; ++h) row.push_back(random_.Normal());
        const std::vector<std::byte> encoded = Encode(kMatrix.dtype, row);
        std::copy(encoded.begin(), encoded.end(), message.row(i));
        values_[place].push_back(Decode(kMatrix.dtype, encoded.data(), kMatrix.hidden));
        for (int32_t k = 0; kind == Kind::kDispatchBackward && k < config_.top_k; ++k) {
          grads_[place].push_back(random_.Normal());
          message.weight()[i * config_.top_k + k] = grads_[place].back();
        }
      }
      messages[RankAt(config_, sums.node, place)] = std::move(message);
    }
    return messages;
  }

  int64_t num_tokens() const { return static_cast<int64_t>(experts_.size()) / config_.top_k; }
  TopK topk() const { return {experts_.data(), nullptr, num_tokens()}; }

  std::vector<int32_t> experts_;
  std::vector<std::vector<std::vector<float>>> values_;
  std::vector<std::vector<float>> grads_;
};

INSTANTIATE_TEST_SUITE_P(All, SumsTest,
                         ::testing::Values(Nodes{2, 2, 2}, Nodes{2, 3, 1}, Nodes{3, 2, 2},
                                           Nodes{2, 4, 2}));

TEST_P(SumsTest, SumsAreInTheOrderOfRanksAndAreCastOnce) {
  for (const Kind kind : {Kind::kCombine, Kind::kDispatchBackward}) {
    const SumsFor sums{.rank = config_.ep_size - 1, .node = 0};
    std::vector<Message> messages = Make(sums, kind);
    const Result<Message> result =
        SumWithinNode(config_, sums, kind, kMatrix, topk(), messages, pool_.Take());
    ASSERT_EQ(FaultOf(result), nullptr);
    const auto& got = std::get<Message>(result);
    ASSERT_EQ(got.header().kind, static_cast<int32_t>(kind));
    ASSERT_EQ(got.header().num_rows, num_tokens());
    ASSERT_EQ(got.header().row_bytes, kMatrix.row_bytes());
    std::vector<int32_t> next(config_.node_size(), 0);
    for (int64_t row = 0; row < num_tokens(); ++row) {
      std::vector<float> want(kMatrix.hidden, 0.0F);
      std::vector<float> want_grads(config_.top_k, 0.0F);
      for (int32_t place = 0; place < config_.node_size(); ++place) {
        if (!GoesTo(row, place)) continue;
        const int32_t i = next[place]++;
        for (int64_t h = 0; h < kMatrix.hidden; ++h) want[h] += values_[place][i][h];
        for (int32_t k = 0; kind == Kind::kDispatchBackward && k < config_.top_k; ++k) {
          const int32_t expert = experts_[row * config_.top_k + k];
          if (expert < 0 || OwnerRank(expert, config_.num_local_experts()) != place) continue;
          want_grads[k] = grads_[place][i * config_.top_k + k];
        }
      }
      for (float& value : want) value = Rounded(kMatrix.dtype, value);
      EXPECT_EQ(Decode(kMatrix.dtype, got.row(row), kMatrix.hidden), want);
      for (int32_t k = 0; kind == Kind::kDispatchBackward && k < config_.top_k; ++k) {
        EXPECT_EQ(got.weight()[row * config_.top_k + k], want_grads[k]);
      }
    }
  }
}

TEST_P(SumsTest, AFaultNamesTheRankOfThisNodeWhoseMessageDoesNotFit) {
  // This rank is at the first place of the last node.
  const SumsFor sums{.rank = RankAt(config_, config_.num_nodes - 1, 0), .node = 0};
  const int32_t place = config_.node_size() - 1;
  std::vector<Message> messages = Make(sums, Kind::kCombine);
  Message& wrong = messages[RankAt(config_, sums.node, place)];
  MessageHeader header = wrong.header();
  ++header.num_rows;
  wrong = Message(pool_.Take(), config_, header);
  const Result<Message> result =
      SumWithinNode(config_, sums, Kind::kCombine, kMatrix, topk(), messages, pool_.Take());
  const Fault* fault = FaultOf(result);
  ASSERT_NE(fault, nullptr);
  EXPECT_EQ(fault->peer, RankAt(config_, config_.num_nodes - 1, place));
}

}  // namespace
}  // namespace jax_sm_free
