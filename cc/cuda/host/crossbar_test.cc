#include "cc/cuda/host/crossbar.h"

#include <chrono>
#include <memory>
#include <thread>

#include "gtest/gtest.h"

namespace jax_sm_free::cuda {
namespace {

TEST(Crossbar, OneAtATimeIntoEachRank) {
  Crossbar crossbar;
  const Crossbar::Ticket first = crossbar.TryTake(1);
  EXPECT_NE(first, 0);
  EXPECT_EQ(crossbar.TryTake(1), 0);
  EXPECT_NE(crossbar.TryTake(2), 0);
  crossbar.Release(1, first);
  EXPECT_NE(crossbar.TryTake(1), 0);
}

TEST(Crossbar, LinksAreShared) {
  const auto links = std::make_shared<Links>();
  Crossbar here(links);
  Crossbar there(links);
  const Crossbar::Ticket ticket = here.TryTake(0);
  EXPECT_EQ(there.TryTake(0), 0);
  here.Release(0, ticket);
  EXPECT_NE(there.TryTake(0), 0);
}

TEST(Crossbar, WhoHoldsALinkForTooLongLosesIt) {
  Crossbar crossbar;
  const Crossbar::Ticket lost = crossbar.TryTake(3);
  std::this_thread::sleep_for(Crossbar::kLost + std::chrono::milliseconds(1));
  EXPECT_NE(crossbar.TryTake(3), 0);
  crossbar.Release(3, lost);  // too late, because another rank has the link
  EXPECT_EQ(crossbar.TryTake(3), 0);
}

}  // namespace
}  // namespace jax_sm_free::cuda
