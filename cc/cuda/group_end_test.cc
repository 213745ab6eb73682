#include "cc/cuda/group_end.h"

#include <memory>
#include <optional>
#include <string>

#include "gtest/gtest.h"

namespace jax_sm_free::cuda {
namespace {

class GroupEndTest : public ::testing::Test {
 protected:
  std::shared_ptr<EndNote> note_ = std::make_shared<EndNote>();
  GroupEnd here_{note_};
  GroupEnd there_{note_};
};

TEST_F(GroupEndTest, HasNotComeAtFirst) {
  EXPECT_FALSE(there_.HasCome());
  EXPECT_EQ(there_.Fault(), std::nullopt);
}

TEST_F(GroupEndTest, ClosingIsNoFault) {
  here_.TellClosed();
  EXPECT_TRUE(there_.HasCome());
  EXPECT_EQ(there_.Fault(), std::nullopt);
}

TEST_F(GroupEndTest, TheFirstFaultStays) {
  here_.TellFault("first");
  there_.TellFault("second, which is longer");
  EXPECT_TRUE(there_.HasCome());
  EXPECT_EQ(there_.Fault(), "first");
  EXPECT_EQ(here_.Fault(), "first");
}

TEST_F(GroupEndTest, AFaultBehindAClosingIsTold) {
  here_.TellClosed();
  EXPECT_FALSE(there_.HasFault());
  there_.TellFault("a fault");
  EXPECT_EQ(here_.Fault(), "a fault");
}

TEST_F(GroupEndTest, LongTextsAreCutOff) {
  here_.TellFault(std::string(2 * sizeof(EndNote::text), 'x'));
  EXPECT_EQ(there_.Fault(), std::string(sizeof(EndNote::text) - 1, 'x'));
}

TEST_F(GroupEndTest, AFaultThatIsNotWrittenYetIsNone) {
  note_->progress = EndNote::kClaimed;
  there_.TellFault("another");
  EXPECT_FALSE(there_.HasCome());
  EXPECT_EQ(there_.Fault(), std::nullopt);
}

}  // namespace
}  // namespace jax_sm_free::cuda
