// Two tiers in two groups: a recv waits until all groups have forwarded.

#include <array>
#include <chrono>
#include <cstdint>
#include <future>
#include <memory>
#include <optional>
#include <vector>

#include "cc/cpu/all_groups.h"
#include "cc/cpu/ops.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using Token = std::array<float, kTokenSize>;
using Ended = std::future<std::optional<Fault>>;

// Two groups of two nodes of a rank each. Ranks are devices. Nobody has a token to send.
class OpsGroupsTest : public ::testing::Test {
 protected:
  HostCall CallOf(Op op, int32_t device) const {
    return {.op = op, .buffer = buffer_, .rank = buffer_->RankOf(device), .run = 1};
  }

  void Send(int32_t device) {
    const DispatchSendIn in{.position = &device, .topk = {}, .rows = {}};
    EXPECT_EQ(DispatchSend(CallOf(Op::kDispatchSend, device), in, tokens_[device].data()),
              std::nullopt);
  }

  template <typename Run>
  Ended Start(Op op, int32_t device, const Run& run) {
    auto promise = std::make_shared<std::promise<std::optional<Fault>>>();
    HostCall call = CallOf(op, device);
    call.done = [promise](const std::optional<Fault>& fault) { promise->set_value(fault); };
    run(call, tokens_[device].data());
    return promise->get_future();
  }

  Ended Forward(int32_t device) {
    return Start(Op::kDispatchForward, device, [&](const HostCall& call, float* token) {
      DispatchForward(call, token, {token, node_topk_[device].data()});
    });
  }

  Ended Recv(int32_t device) {
    return Start(Op::kDispatchRecv, device, [](const HostCall& call, float* token) {
      Receive(call, token, [](const Config&, std::vector<Message>&) { return std::nullopt; });
    });
  }

  const Config config_{
      .ep_size = 2, .num_experts = 2, .timeout_s = 60, .num_nodes = 2, .node_stride = 1};
  const std::shared_ptr<HostBuffer> buffer_ = std::make_shared<HostBuffer>(
      1, config_,
      std::vector<std::optional<Place>>{Place{.group = 0, .rank = 0, .position = 0},
                                        Place{.group = 0, .rank = 1, .position = 1},
                                        Place{.group = 1, .rank = 0, .position = 2},
                                        Place{.group = 1, .rank = 1, .position = 3}});
  std::array<Token, 4> tokens_{};
  std::array<std::array<int32_t, 2>, 4> node_topk_{};
};

TEST_F(OpsGroupsTest, ARecvWaitsForTheForwardsOfAnotherGroup) {
  for (int32_t device = 0; device < 4; ++device) Send(device);
  for (int32_t device = 0; device < 3; ++device) EXPECT_EQ(Forward(device).get(), std::nullopt);
  Ended ended = Recv(0);
  // A rank waits longer than this for a group of which one rank has forwarded.
  const std::chrono::duration<double> patience(1.3 * AllGroups::kPatienceSeconds);
  EXPECT_EQ(ended.wait_for(patience), std::future_status::timeout);
  EXPECT_EQ(Forward(3).get(), std::nullopt);
  EXPECT_EQ(ended.get(), std::nullopt);
}

}  // namespace
}  // namespace jax_sm_free
