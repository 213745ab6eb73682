#include "cc/cpu/roll_call.h"

#include <chrono>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

TEST(RollCallTest, ReturnsWhenAllHaveBeenHeardOf) {
  RollCall roll(1, 3);
  roll.Hear(0);
  std::thread late([&roll] {
    std::this_thread::sleep_for(milliseconds(20));
    roll.Hear(2);
  });
  EXPECT_TRUE(roll.Await(seconds(100)).empty());
  late.join();
}

TEST(RollCallTest, NamesThoseThatAreLostAndThoseThatAreSilent) {
  RollCall roll(0, 4);
  roll.Hear(1);
  roll.Lose(2, "it was refused");
  const std::vector<Wire::Unreached> unreached = roll.Await(milliseconds(20));
  ASSERT_EQ(unreached.size(), 2U);
  EXPECT_EQ(unreached[0].peer, 2);
  EXPECT_EQ(unreached[0].reason, "it was refused");
  EXPECT_EQ(unreached[1].peer, 3);
  EXPECT_EQ(unreached[1].reason, "no answer within 0.02 s");
}

TEST(RollCallTest, ALossEndsTheWait) {
  RollCall roll(0, 2);
  roll.Lose(1, "first");
  roll.Lose(1, "second");
  roll.Hear(1);
  const std::vector<Wire::Unreached> unreached = roll.Await(seconds(100));
  ASSERT_EQ(unreached.size(), 1U);
  EXPECT_EQ(unreached[0].reason, "first");
}

TEST(RollCallTest, WhoWasHeardOfOnceHasAWay) {
  RollCall roll(0, 2);
  roll.Hear(1);
  roll.Lose(1, "later");
  EXPECT_TRUE(roll.Await(seconds(100)).empty());
}

}  // namespace
}  // namespace jax_sm_free
