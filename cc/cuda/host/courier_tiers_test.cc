#include <cstdint>
#include <cstring>
#include <memory>
#include <set>
#include <variant>

#include "cc/cuda/host/courier.h"
#include "cc/cuda/host/courier_testing.h"
#include "cc/cuda/rank_view.h"
#include "gtest/gtest.h"

namespace jax_sm_free::cuda {
namespace {

// In two tiers of two nodes, rank 1 sends three messages to ranks out of reach: one to each rank of
// its node for each node, and one along its rail.
TEST(CourierOfTiersTest, EachMessageGoesToThePlaceThatItsOtherEndHasForIt) {
  Config config = kConfig;
  config.num_nodes = 2;
  config.node_stride = 2;
  const std::set<int32_t> served = {0, 3};
  Network network(config);
  auto made = Courier::Make(std::make_unique<FakeRegions>(&network, served), config);
  const auto courier = std::get<std::shared_ptr<Courier>>(std::move(made));
  RankView view = ViewOf(config, 1);
  Bytes own(view.regions.total);
  for (int32_t rank = 0; rank < config.ep_size; ++rank) view.base[rank] = courier->OutboxOf(rank);
  view.base[view.rank] = own.data();
  int num_sent = 0;
  for (int32_t message = 0; message < view.regions.num_messages; ++message) {
    const OtherEnd& end = view.messages.end[message];
    if (served.count(end.rank) == 0) continue;
    const int32_t slot = 1;
    const int64_t index = MessageIndex(view, slot, end.message);
    const auto content = static_cast<std::byte>(message + 1);
    const uint64_t number = 10 + message;
    std::byte* outbox = view.base[end.rank];
    std::memset(outbox + view.regions.notices + index * view.regions.notice_bytes, message + 1,
                view.regions.notice_bytes);
    std::memcpy(outbox + view.regions.noticed + index * 8, &number, sizeof(number));
    EXPECT_TRUE(courier->Forward(view));
    EXPECT_FALSE(courier->Forward(view));
    EXPECT_EQ(*network.At(end.rank, view.regions.notices + index * view.regions.notice_bytes),
              content);
    EXPECT_EQ(network.WordAt(end.rank, view.regions.noticed + index * 8), number);

    const int64_t stage = StageOffset(view, slot, end.stage);
    own[stage + 7] = content;
    courier->Send(view, {.message = message,
                         .slot = slot,
                         .begin = 0,
                         .end = 64,
                         .common = 64,
                         .common_at = stage + 64,
                         .signal = number});
    const int64_t there = view.regions.recv + index * view.regions.message_bytes;
    EXPECT_EQ(*network.At(end.rank, there + 7), content);
    EXPECT_EQ(network.WordAt(end.rank, view.regions.signals + index * 8), number);
    ++num_sent;
  }
  EXPECT_EQ(num_sent, 2 + 1);
}

}  // namespace
}  // namespace jax_sm_free::cuda
