#include "cc/fault.h"

#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

TEST(FaultTest, DescribesEveryField) {
  const Fault fault{.op = "dispatch_recv",
                    .rank = 2,
                    .peer = 5,
                    .expected = "4 rows",
                    .seen = "3 rows",
                    .exchange = "dispatch exchange 7, slot 1"};
  EXPECT_EQ(fault.Describe(),
            "jax_sm_free: dispatch_recv on rank 2, peer rank 5: expected 4 rows, seen 3 rows "
            "[dispatch exchange 7, slot 1]");
}

TEST(FaultTest, LeavesOutPeerAndExchangeThatAreUnknown) {
  const Fault fault{.op = "close", .rank = 0, .expected = "open", .seen = "closed", .exchange = {}};
  EXPECT_EQ(fault.Describe(), "jax_sm_free: close on rank 0: expected open, seen closed");
}

TEST(FaultTest, LeavesOutARankThatIsNotKnownYet) {
  const Fault fault{.op = "Buffer", .expected = "memory", .seen = "none", .exchange = {}};
  EXPECT_EQ(fault.Describe(), "jax_sm_free: Buffer: expected memory, seen none");
}

TEST(FaultTest, FaultOfAValueIsNull) {
  const Result<int> result = 3;
  EXPECT_EQ(FaultOf(result), nullptr);
}

TEST(FaultTest, FaultOfAFaultIsTheFault) {
  const Result<int> result = Fault{.rank = 3, .expected = {}, .seen = {}, .exchange = {}};
  ASSERT_NE(FaultOf(result), nullptr);
  EXPECT_EQ(FaultOf(result)->rank, 3);
}

}  // namespace
}  // namespace jax_sm_free
