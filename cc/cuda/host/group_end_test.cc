#include "cc/cuda/host/group_end.h"

#include <memory>
#include <optional>
#include <string>

#include "gtest/gtest.h"

namespace jax_sm_free::cuda {
namespace {

class GroupEndTest : public ::testing::Test {
 protected:
  std::shared_ptr<ClosedNote> closed_ = std::make_shared<ClosedNote>();
  std::shared_ptr<FaultNote> fault_ = std::make_shared<FaultNote>();
  GroupEnd here_{closed_, fault_};
  GroupEnd there_{closed_, fault_};
  GroupEnd other_group_{std::make_shared<ClosedNote>(), fault_};
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

TEST_F(GroupEndTest, AFaultEndsOtherGroups) {
  here_.TellFault("a fault");
  EXPECT_TRUE(other_group_.HasCome());
  EXPECT_EQ(other_group_.Fault(), "a fault");
}

TEST_F(GroupEndTest, ClosingEndsOneGroupAlone) {
  here_.TellClosed();
  EXPECT_FALSE(other_group_.HasCome());
}

TEST_F(GroupEndTest, LongTextsAreCutOff) {
  here_.TellFault(std::string(2 * sizeof(FaultNote::text), 'x'));
  EXPECT_EQ(there_.Fault(), std::string(sizeof(FaultNote::text) - 1, 'x'));
}

TEST_F(GroupEndTest, AFaultThatIsNotWrittenYetIsNone) {
  fault_->progress = FaultNote::kClaimed;
  there_.TellFault("another");
  EXPECT_FALSE(there_.HasCome());
  EXPECT_EQ(there_.Fault(), std::nullopt);
}

}  // namespace
}  // namespace jax_sm_free::cuda
