#include "cc/cpu/call_site.h"

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

class CallSiteTest : public ::testing::Test {
 protected:
  std::unique_ptr<CallCopy> Add(const std::string& program, int64_t number, int64_t lowering = 0) {
    return sites_.Add("a", program, lowering, number,
                      "dispatch_send " + std::to_string(number) + " ()");
  }

  CallSites sites_;
};

TEST_F(CallSiteTest, CallsOfAProgramHaveNumbersOfTheirOwn) {
  const auto first = Add("jit_f", 0);
  const auto second = Add("jit_f", 1);
  EXPECT_NE(first->Site()->number, second->Site()->number);
  EXPECT_EQ(first->Site()->Describe(), "jit_f, dispatch_send 0 ()");
  EXPECT_EQ(second->Site()->num_copies, 1);
}

TEST_F(CallSiteTest, CopiesAreNumberedInTheOrderOfTheirMaking) {
  const auto first = Add("jit_f", 3);
  const auto second = Add("jit_f", 3);
  EXPECT_EQ(second->Site()->number, first->Site()->number + 1);
  EXPECT_EQ(second->Site()->executable, first->Site()->executable);
  EXPECT_EQ(first->Site()->num_copies, 2);
  EXPECT_EQ(second->Site()->Describe(), "jit_f, dispatch_send 3 (), copy 1 of 2");
}

TEST_F(CallSiteTest, EqualProgramsAreToldApartByTheirLowerings) {
  const auto one = Add("jit_f", 0, 0);
  const auto other = Add("jit_f", 0, 1);
  EXPECT_EQ(*one->Site(), *other->Site());
  EXPECT_NE(one->Site()->executable, other->Site()->executable);
  EXPECT_EQ(one->Site()->num_copies, 1);
}

TEST_F(CallSiteTest, WhatIsMadeAfterACopyHasRunIsAnotherProgram) {
  const auto first = Add("jit_f", 0);
  const CallSite ran = *first->Site();
  const auto again = Add("jit_f", 0);
  EXPECT_EQ(*again->Site(), ran);
  EXPECT_NE(again->Site()->executable, ran.executable);
  EXPECT_EQ(*first->Site(), ran);
}

TEST_F(CallSiteTest, CopiesThatAreGoneBeforeAnyRanDoNotCount) {
  Add("jit_f", 0).reset();
  const auto kept = Add("jit_f", 0);
  EXPECT_EQ(kept->Site()->num_copies, 1);
  EXPECT_EQ(kept->Site()->Describe(), "jit_f, dispatch_send 0 ()");
}

TEST_F(CallSiteTest, ProgramsBuffersAndOperandsAreToldApart) {
  const auto one = Add("jit_f", 0);
  const auto other_program = Add("jit_g", 0);
  const auto other_buffer = sites_.Add("b", "jit_f", 0, 0, "dispatch_send 0 ()");
  const auto other_operands = sites_.Add("a", "jit_f", 0, 0, "dispatch_send 0 (f32)");
  EXPECT_EQ(one->Site()->num_copies, 1);
  EXPECT_NE(*one->Site(), *other_program->Site());
  EXPECT_NE(*one->Site(), *other_operands->Site());
  EXPECT_EQ(*one->Site(), *other_buffer->Site());
}

TEST_F(CallSiteTest, LongNamesAreCutButStayApart) {
  const std::string name(300, 'f');
  const CallSite one = *Add(name + "1", 0)->Site();
  const CallSite other = *Add(name + "2", 0)->Site();
  EXPECT_EQ(one.program.size(), kMaxProgramBytes);
  EXPECT_NE(one.program, other.program);
}

TEST_F(CallSiteTest, AllDevicesAskAtOnce) {
  const auto first = Add("jit_f", 0);
  const auto second = Add("jit_f", 0);
  std::vector<std::thread> threads;
  for (int device = 0; device < 4; ++device) {
    threads.emplace_back([&] { EXPECT_EQ(second->Site()->num_copies, 2); });
    threads.emplace_back([&] { EXPECT_EQ(first->Site()->num_copies, 2); });
    threads.emplace_back([&] { Add("jit_f", 1)->Site(); });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace jax_sm_free
