#include "cc/cpu/parcels.h"

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "cc/tiers.h"
#include "cc/tiers_testing.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using testing::Nodes;

class ParcelsTest : public ::testing::TestWithParam<Nodes> {
 protected:
  // Who carries each (number, destination) of a round, by what the ranks send.
  using Carriers = std::map<std::pair<int32_t, int32_t>, std::vector<int32_t>>;

  void Add(const Parcels& parcels, int32_t rank, Carriers& carriers) {
    for (const Transport::Parcel& parcel : parcels) {
      carriers[{parcel.number, parcel.dst}].push_back(rank);
    }
  }

  // Each rank gets what hop.h says, once, and from whom it says.
  void ExpectRound(Hop hop, const Carriers& carriers) {
    for (int32_t dst = 0; dst < config_.ep_size; ++dst) {
      int32_t num_messages = 0;
      for (int32_t number = 0; number < config_.ep_size; ++number) {
        const auto found = carriers.find({number, dst});
        ASSERT_EQ(found != carriers.end(), Comes(config_, hop, number, dst));
        if (found == carriers.end()) continue;
        EXPECT_EQ(found->second, std::vector{CarrierOf(config_, hop, number, dst)});
        ++num_messages;
      }
      EXPECT_EQ(num_messages, NumMessages(config_, hop));
    }
  }

  const Config config_ = GetParam().AddTo({});
};

TEST_P(ParcelsTest, AllMessagesOfARoundAreCarriedOnce) {
  for (const auto& [first, last] :
       {std::pair(Hop::kRail, Hop::kSpread), std::pair(Hop::kGather, Hop::kHome)}) {
    Carriers of_first;
    Carriers of_last;
    for (int32_t rank = 0; rank < config_.ep_size; ++rank) {
      Add(ParcelsOfSend(config_, first, rank), rank, of_first);
      Add(ParcelsOfSend(config_, last, rank), rank, of_last);
      Add(ParcelsOfForward(config_, last, rank), rank, of_last);
    }
    ExpectRound(first, of_first);
    ExpectRound(last, of_last);
  }
}

TEST_P(ParcelsTest, OnlyRailsCrossNodes) {
  for (const Hop hop : {Hop::kSpread, Hop::kGather, Hop::kHome, Hop::kRail}) {
    for (int32_t rank = 0; rank < config_.ep_size; ++rank) {
      for (const Parcels& parcels :
           {ParcelsOfSend(config_, hop, rank), ParcelsOfForward(config_, hop, rank)}) {
        for (const Transport::Parcel& parcel : parcels) {
          if (NodeOf(config_, parcel.dst) == NodeOf(config_, rank)) continue;
          EXPECT_EQ(PlaceInNode(config_, parcel.dst), PlaceInNode(config_, rank));
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, ParcelsTest,
                         ::testing::Values(Nodes{2, 4, 4}, Nodes{2, 4, 1}, Nodes{4, 2, 2},
                                           Nodes{3, 1, 1}, Nodes{3, 2, 1}, Nodes{2, 6, 3}));

TEST(ParcelsTest, ADirectRoundStartsBehindTheSender) {
  const Config config{.ep_size = 3};
  const Parcels parcels = ParcelsOfSend(config, Hop::kDirect, 1);
  ASSERT_EQ(parcels.size(), 3U);
  for (int32_t i = 0; i < 3; ++i) {
    EXPECT_EQ(parcels[i].number, 1);
    EXPECT_EQ(parcels[i].dst, (2 + i) % 3);
  }
}

}  // namespace
}  // namespace jax_sm_free
