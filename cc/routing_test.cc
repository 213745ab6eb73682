#include "cc/routing.h"

#include <algorithm>
#include <array>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

class Random {
 public:
  int32_t Below(int32_t n) { return static_cast<int32_t>(engine_() % n); }

 private:
  std::mt19937 engine_{7};
};

TEST(RoutingTest, ExpertsLieInBlocksOnTheRanks) {
  EXPECT_EQ(OwnerRank(0, 4), 0);
  EXPECT_EQ(OwnerRank(3, 4), 0);
  EXPECT_EQ(OwnerRank(4, 4), 1);
  EXPECT_EQ(LocalExpert(3, 4), 3);
  EXPECT_EQ(LocalExpert(4, 4), 0);
}

TEST(RoutingTest, RoundUpKeepsMultiples) {
  EXPECT_EQ(RoundUp(0, 16), 0);
  EXPECT_EQ(RoundUp(16, 16), 16);
  EXPECT_EQ(RoundUp(17, 16), 32);
  EXPECT_EQ(RoundUp(5, 1), 5);
}

// The contract, tried level by level.
int64_t CutLevelByTrying(const std::vector<int64_t>& counts, int64_t alignment, int64_t capacity) {
  const int64_t highest = *std::max_element(counts.begin(), counts.end());
  int64_t best = 0;
  for (int64_t level = 0; level <= highest; ++level) {
    int64_t rows = 0;
    for (const int64_t count : counts) rows += RoundUp(std::min(count, level), alignment);
    if (rows <= capacity) best = level;
  }
  return best;
}

TEST(CutLevelTest, IsTheLargestLevelThatFits) {
  Random random;
  for (int i = 0; i < 5000; ++i) {
    std::vector<int64_t> counts(1 + random.Below(9));
    for (int64_t& count : counts) count = random.Below(random.Below(2) == 0 ? 4 : 60);
    constexpr std::array<int64_t, 4> kAlignments{1, 2, 16, 24};
    const int64_t alignment = kAlignments[random.Below(4)];
    const int64_t capacity = random.Below(300);
    const auto num_groups = static_cast<int32_t>(counts.size());
    ASSERT_EQ(CutLevel(counts.data(), num_groups, alignment, capacity),
              CutLevelByTrying(counts, alignment, capacity));
  }
}

TEST(CutLevelTest, IsTheLargestCountWhereAllFits) {
  const std::vector<int64_t> counts{5, 0, 3};
  EXPECT_EQ(CutLevel(counts.data(), 3, 1, 8), 5);
  EXPECT_EQ(CutLevel(counts.data(), 3, 1, 1000), 5);
}

TEST(CutLevelTest, CutsTheLargestGroupFirst) {
  const std::vector<int64_t> counts{5, 0, 3};
  EXPECT_EQ(CutLevel(counts.data(), 3, 1, 7), 4);
}

TEST(CutLevelTest, IsZeroWithoutCapacityOrRows) {
  const std::vector<int64_t> counts{5, 3};
  const std::vector<int64_t> none{0, 0};
  EXPECT_EQ(CutLevel(counts.data(), 2, 1, 0), 0);
  EXPECT_EQ(CutLevel(counts.data(), 2, 16, 31), 0);
  EXPECT_EQ(CutLevel(none.data(), 2, 16, 100), 0);
}

TEST(CutLevelTest, CountsPastTwoToThe31DoNotOverflow) {
  const std::vector<int64_t> counts{int64_t{1} << 40, int64_t{1} << 40};
  EXPECT_EQ(CutLevel(counts.data(), 2, 1, int64_t{1} << 40), int64_t{1} << 39);
}

// The rows per expert of every source, and the plan that they make.
struct Case {
  Config config;
  std::vector<std::vector<int32_t>> rows_per_expert;  // [source][expert]

  GroupPlan Plan() const {
    std::vector<const int32_t*> pointers;
    for (const auto& rows : rows_per_expert) pointers.push_back(rows.data());
    return {config, pointers};
  }
};

Case RandomCase(Random& random) {
  Case made;
  made.config.ep_size = 1 + random.Below(5);
  made.config.num_experts = made.config.ep_size * (1 + random.Below(5));
  made.config.expert_alignment = random.Below(2) == 0 ? 1 : 1 + random.Below(9);
  made.config.recv_capacity = random.Below(200);
  made.rows_per_expert.resize(made.config.ep_size);
  for (auto& rows : made.rows_per_expert) {
    rows.resize(made.config.num_local_experts());
    for (int32_t& count : rows) count = random.Below(12);
  }
  return made;
}

TEST(GroupPlanTest, GroupsFollowEachOtherAndFitTheCapacity) {
  Random random;
  for (int i = 0; i < 1000; ++i) {
    const Case made = RandomCase(random);
    const GroupPlan plan = made.Plan();
    int64_t end = 0;
    for (int32_t e = 0; e < made.config.num_local_experts(); ++e) {
      EXPECT_EQ(plan.start(e), end);
      EXPECT_EQ(plan.group_size(e), RoundUp(plan.kept(e), made.config.expert_alignment));
      EXPECT_LE(plan.kept(e), plan.count(e));
      end += plan.group_size(e);
    }
    EXPECT_LE(end, made.config.recv_capacity);
  }
}

TEST(GroupPlanTest, CountsEveryRowWhetherKeptOrDropped) {
  Random random;
  for (int i = 0; i < 1000; ++i) {
    const Case made = RandomCase(random);
    const GroupPlan plan = made.Plan();
    int64_t dropped = 0;
    for (int32_t e = 0; e < made.config.num_local_experts(); ++e) {
      int64_t count = 0;
      for (const auto& rows : made.rows_per_expert) count += rows[e];
      EXPECT_EQ(plan.count(e), count);
      dropped += count - plan.kept(e);
    }
    EXPECT_EQ(plan.dropped(), dropped);
  }
}

TEST(GroupPlanTest, RowsAreUniqueAndInOrderOfExpertSourcePosition) {
  Random random;
  for (int i = 0; i < 1000; ++i) {
    const Case made = RandomCase(random);
    const GroupPlan plan = made.Plan();
    int64_t last = -1;
    int64_t dropped = 0;
    for (int32_t e = 0; e < made.config.num_local_experts(); ++e) {
      int64_t kept = 0;
      for (int32_t source = 0; source < made.config.ep_size; ++source) {
        for (int32_t position = 0; position < made.rows_per_expert[source][e]; ++position) {
          const int64_t row = plan.Row(source, e, position);
          if (row < 0) {
            ++dropped;
            continue;
          }
          EXPECT_GT(row, last);
          EXPECT_EQ(row, plan.start(e) + kept);  // the first rows are kept, and there are no gaps
          last = row;
          ++kept;
        }
      }
      EXPECT_EQ(kept, plan.kept(e));
    }
    EXPECT_EQ(dropped, plan.dropped());
  }
}

TEST(GroupPlanTest, CapacityExactlyFullDropsNothing) {
  Case made{.config = {.ep_size = 2, .num_experts = 4, .recv_capacity = 10},
            .rows_per_expert = {{3, 1}, {2, 4}}};
  EXPECT_EQ(made.Plan().dropped(), 0);
}

TEST(GroupPlanTest, CapacityOneShortDropsTheLastRowOfTheLargestGroups) {
  Case made{.config = {.ep_size = 2, .num_experts = 4, .recv_capacity = 8},
            .rows_per_expert = {{3, 1}, {2, 3}}};
  const GroupPlan plan = made.Plan();
  EXPECT_EQ(plan.dropped(), 1);
  EXPECT_EQ(plan.Row(1, 0, 1), -1);
  EXPECT_EQ(plan.kept(0), 4);
  EXPECT_EQ(plan.kept(1), 4);
}

TEST(GroupPlanTest, ExpertCapacityIsTheSizeOfEveryGroup) {
  Case made{.config = {.ep_size = 2, .num_experts = 6, .recv_capacity = 12, .expert_capacity = 4},
            .rows_per_expert = {{3, 0, 1}, {2, 0, 3}}};
  const GroupPlan plan = made.Plan();
  EXPECT_EQ(plan.dropped(), 1);
  EXPECT_EQ(plan.Row(1, 0, 1), -1);
  EXPECT_EQ(plan.Row(1, 2, 2), 11);
  for (int32_t e = 0; e < 3; ++e) {
    EXPECT_EQ(plan.start(e), 4 * e);
    EXPECT_EQ(plan.group_size(e), 4);
    EXPECT_EQ(plan.kept(e), std::min<int64_t>(plan.count(e), 4));
  }
}

TEST(GroupPlanTest, CapacityZeroDropsEverything) {
  Case made{.config = {.ep_size = 2, .num_experts = 4, .recv_capacity = 0},
            .rows_per_expert = {{3, 1}, {2, 4}}};
  const GroupPlan plan = made.Plan();
  EXPECT_EQ(plan.dropped(), 10);
  EXPECT_EQ(plan.Row(0, 0, 0), -1);
  EXPECT_EQ(plan.group_size(0), 0);
}

}  // namespace
}  // namespace jax_sm_free
