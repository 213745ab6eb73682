#include "cc/tiers.h"

#include <set>
#include <utility>

#include "cc/tiers_testing.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using testing::Nodes;

class TiersTest : public ::testing::TestWithParam<Nodes> {
 protected:
  const Config config_ = GetParam().AddTo({.num_experts = 3 * GetParam().ep_size()});
};

TEST_P(TiersTest, EachRankHasOnePlaceOnOneNode) {
  std::set<std::pair<int32_t, int32_t>> seen;
  for (int32_t rank = 0; rank < config_.ep_size; ++rank) {
    const int32_t node = NodeOf(config_, rank);
    const int32_t place = PlaceInNode(config_, rank);
    EXPECT_GE(node, 0);
    EXPECT_LT(node, config_.num_nodes);
    EXPECT_GE(place, 0);
    EXPECT_LT(place, config_.node_size());
    EXPECT_EQ(RankAt(config_, node, place), rank);
    seen.emplace(node, place);
  }
  EXPECT_EQ(seen.size(), static_cast<size_t>(config_.ep_size));
}

// A contract of sums: they are in the order of ranks within a node.
TEST_P(TiersTest, PlacesAreInTheOrderOfRanks) {
  for (int32_t node = 0; node < config_.num_nodes; ++node) {
    for (int32_t place = 1; place < config_.node_size(); ++place) {
      EXPECT_LT(RankAt(config_, node, place - 1), RankAt(config_, node, place));
    }
  }
}

TEST_P(TiersTest, SortedExpertsAreThoseOfTheNodesInTurn) {
  const Config rail = RailConfig(config_);
  const Config node = NodeConfig(config_);
  EXPECT_EQ(rail.num_local_experts(), node.num_experts);
  std::set<int32_t> seen;
  for (int32_t expert = 0; expert < config_.num_experts; ++expert) {
    const int32_t owner = OwnerRank(expert, config_.num_local_experts());
    const int32_t sorted = SortedByNode(config_, expert);
    seen.insert(sorted);
    EXPECT_EQ(OwnerRank(sorted, rail.num_local_experts()), NodeOf(config_, owner));
    const int32_t node_expert = LocalExpert(sorted, rail.num_local_experts());
    EXPECT_EQ(OwnerRank(node_expert, node.num_local_experts()), PlaceInNode(config_, owner));
    EXPECT_EQ(LocalExpert(node_expert, node.num_local_experts()),
              LocalExpert(expert, config_.num_local_experts()));
  }
  EXPECT_EQ(seen.size(), static_cast<size_t>(config_.num_experts));
}

INSTANTIATE_TEST_SUITE_P(All, TiersTest,
                         ::testing::Values(Nodes{1, 4, 4}, Nodes{1, 4, 1}, Nodes{2, 4, 4},
                                           Nodes{2, 4, 1}, Nodes{4, 2, 2}, Nodes{3, 1, 1},
                                           Nodes{2, 6, 2}, Nodes{2, 6, 3}));

// Counts of 64 node experts, in the place of counts of 8 experts.
TEST(TiersTest, ARailMessageHasMoreCountsThanAnother) {
  const Config config{.ep_size = 32,
                      .num_experts = 256,
                      .top_k = 8,
                      .max_tokens = 4096,
                      .row_bytes = 14336,
                      .num_nodes = 4,
                      .node_stride = 8};
  EXPECT_EQ(MaxMessageBytesOfTiers(config), MaxMessageBytes(config) + (256 - 64));
}

}  // namespace
}  // namespace jax_sm_free
