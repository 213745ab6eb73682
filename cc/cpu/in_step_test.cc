#include "cc/cpu/in_step.h"

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using ::testing::IsSubstring;

std::shared_ptr<const CallSite> Site(const std::string& program, int64_t number, int copies = 1,
                                     int64_t executable = 0) {
  return std::make_shared<CallSite>(CallSite{.number = number,
                                             .program = program,
                                             .call = "dispatch_send " + std::to_string(number),
                                             .num_copies = copies,
                                             .executable = executable});
}

// Ranks 0 and 1 are in this process, and ranks 2 and 3 in two other processes.
class InStepTest : public ::testing::Test {
 protected:
  std::optional<Fault> Check(int64_t run, std::shared_ptr<const CallSite> site, int32_t rank,
                             std::optional<int64_t> start = std::nullopt) {
    const int64_t number = site->number;
    return in_step_.Check({.run = run, .call_site = number},
                          {std::move(site), rank, start.value_or(run)});
  }

  InStep in_step_{{0, 0, 1, 2}, 0};
};

TEST_F(InStepTest, RanksThatSayTheSameAreInStep) {
  for (int64_t run = 0; run < 1000; ++run) {
    for (int32_t rank = 0; rank < 4; ++rank) {
      EXPECT_FALSE(Check(run, Site("jit_f", 7), rank).has_value());
      EXPECT_FALSE(Check(run, Site("jit_f", 8), rank).has_value());
    }
  }
  EXPECT_EQ(in_step_.SaidHere({.run = 999, .call_site = 8})->site->number, 8);
  EXPECT_EQ(in_step_.SaidHere({.run = 999, .call_site = 8})->start, 999);
  EXPECT_EQ(in_step_.SaidHere({.run = 999, .call_site = 9}), nullptr);
  EXPECT_EQ(in_step_.SaidHere({.run = 0, .call_site = 8}), nullptr);
}

TEST_F(InStepTest, WhatOthersSayIsNotSaidHere) {
  EXPECT_FALSE(Check(3, Site("jit_f", 0), 2, 42).has_value());
  EXPECT_EQ(in_step_.SaidHere({.run = 3, .call_site = 0}), nullptr);
  EXPECT_FALSE(Check(3, Site("jit_f", 0), 1, 42).has_value());
  EXPECT_EQ(in_step_.SaidHere({.run = 3, .call_site = 0})->rank, 1);
}

// A run that ended before its first send has no number.
TEST_F(InStepTest, ARankThatHasStartedItsProgramMoreOftenIsNamed) {
  EXPECT_FALSE(Check(0, Site("jit_f", 0), 0, 100).has_value());
  const std::optional<Fault> fault = Check(0, Site("jit_f", 0), 2, 101);
  ASSERT_TRUE(fault.has_value());
  EXPECT_EQ(fault->rank, 0);
  EXPECT_EQ(fault->peer, 2);
  EXPECT_PRED_FORMAT2(IsSubstring, "run 0 of this buffer is jit_f", fault->expected);
  EXPECT_PRED_FORMAT2(IsSubstring, "started 1 times more often than here", fault->seen);
}

TEST_F(InStepTest, AndARankThatHasDoneSoLessOften) {
  EXPECT_FALSE(Check(0, Site("jit_f", 0), 2, 98).has_value());
  const std::optional<Fault> fault = Check(0, Site("jit_f", 0), 0, 100);
  ASSERT_TRUE(fault.has_value());
  EXPECT_EQ(fault->rank, 0);
  EXPECT_EQ(fault->peer, 2);
  EXPECT_PRED_FORMAT2(IsSubstring, "started 2 times less often than here", fault->seen);
}

// This happens if one process has compiled a program and another has read it from a cache.
TEST_F(InStepTest, ProcessesMayCountFromOtherNumbersButAlike) {
  constexpr int64_t kOther = 1234567890;
  constexpr int64_t kThird = 2147483640;  // wraps around
  for (int64_t run = 0; run < 20; ++run) {
    EXPECT_FALSE(Check(run, Site("jit_f", 0), 0, run).has_value());
    EXPECT_FALSE(Check(run, Site("jit_f", 0), 2, kOther + run).has_value());
    EXPECT_FALSE(Check(run, Site("jit_f", 0), 3, static_cast<int32_t>(kThird + run)).has_value());
    EXPECT_FALSE(Check(run, Site("jit_f", 0), 1, run).has_value());
  }
  EXPECT_FALSE(Check(20, Site("jit_f", 0), 0, 20).has_value());
  const std::optional<Fault> fault = Check(20, Site("jit_f", 0), 2, kOther + 21);
  ASSERT_TRUE(fault.has_value());
  EXPECT_PRED_FORMAT2(IsSubstring, "started 1 times more often than here", fault->seen);
}

// The first statement of the other processes comes from another process in each run.
TEST_F(InStepTest, WhatEachProcessCountsFromIsKnownByAllItHasRunWith) {
  constexpr int64_t kSecond = 1234567;
  constexpr int64_t kThird = 7654321;
  EXPECT_FALSE(Check(0, Site("jit_f", 0), 2, kSecond).has_value());
  EXPECT_FALSE(Check(0, Site("jit_f", 0), 0, 0).has_value());
  EXPECT_FALSE(Check(0, Site("jit_f", 0), 3, kThird).has_value());
  EXPECT_FALSE(Check(1, Site("jit_f", 0), 0, 1).has_value());
  EXPECT_TRUE(Check(1, Site("jit_f", 0), 3, kThird + 2).has_value());
}

TEST_F(InStepTest, EqualProgramsOfAProcessCountFromOtherNumbers) {
  for (int64_t run = 0; run < 4; ++run) {
    const bool is_first = run % 2 == 0;
    const int64_t here = is_first ? 0 : 1234567;
    const int64_t there = is_first ? 7654321 : 11;
    const int64_t start = run / 2;
    EXPECT_FALSE(Check(run, Site("jit_f", 0, 1, is_first ? 5 : 6), 0, here + start).has_value());
    EXPECT_FALSE(Check(run, Site("jit_f", 0, 1, is_first ? 8 : 9), 2, there + start).has_value());
  }
  EXPECT_FALSE(Check(4, Site("jit_f", 0, 1, 6), 0, 1234567 + 2).has_value());
  EXPECT_TRUE(Check(4, Site("jit_f", 0, 1, 9), 2, 11 + 3).has_value());
}

TEST_F(InStepTest, RanksOfOneProcessAreOfOneStart) {
  EXPECT_FALSE(Check(0, Site("jit_f", 0), 0, 100).has_value());
  EXPECT_TRUE(Check(0, Site("jit_f", 0), 1, 70000000).has_value());
}

TEST_F(InStepTest, AnotherProgramInTheSameRunNamesBoth) {
  EXPECT_FALSE(Check(17, Site("jit_f", 0), 1).has_value());
  const std::optional<Fault> fault = Check(17, Site("jit_g", 5), 2);
  ASSERT_TRUE(fault.has_value());
  EXPECT_EQ(fault->rank, 1);
  EXPECT_EQ(fault->peer, 2);
  EXPECT_PRED_FORMAT2(IsSubstring, "here run 17 of this buffer is jit_f", fault->expected);
  EXPECT_PRED_FORMAT2(IsSubstring, "run 17 of this buffer is jit_g, dispatch_send 5", fault->seen);
}

TEST_F(InStepTest, TheRankOfThisProcessIsNamedFirstWhoeverCameFirst) {
  EXPECT_FALSE(Check(17, Site("jit_g", 0), 3).has_value());
  const std::optional<Fault> fault = Check(17, Site("jit_f", 0), 0);
  ASSERT_TRUE(fault.has_value());
  EXPECT_EQ(fault->rank, 0);
  EXPECT_EQ(fault->peer, 3);
  EXPECT_PRED_FORMAT2(IsSubstring, "jit_f", fault->expected);
  EXPECT_PRED_FORMAT2(IsSubstring, "jit_g", fault->seen);
}

TEST_F(InStepTest, AnotherNumberOfCopiesIsAnotherProgram) {
  EXPECT_FALSE(Check(0, Site("jit_f", 0, 2), 0).has_value());
  const std::optional<Fault> fault = Check(0, Site("jit_f", 0, 1), 2);
  ASSERT_TRUE(fault.has_value());
  EXPECT_PRED_FORMAT2(IsSubstring, "copy 0 of 2", fault->expected);
}

TEST_F(InStepTest, ARunThatIsLongOverIsAFault) {
  for (int64_t run = 0; run < 200; ++run) EXPECT_FALSE(Check(run, Site("jit_f", 0), 0).has_value());
  EXPECT_FALSE(Check(150, Site("jit_f", 0), 2).has_value());
  const std::optional<Fault> fault = Check(3, Site("jit_f", 0), 2);
  ASSERT_TRUE(fault.has_value());
  EXPECT_EQ(fault->peer, 2);
  EXPECT_PRED_FORMAT2(IsSubstring, "run 3", fault->seen);
}

}  // namespace
}  // namespace jax_sm_free
