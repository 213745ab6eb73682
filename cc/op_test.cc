#include "cc/op.h"

#include <string>

#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

TEST(OpTest, ANameIsThatOfItsKindAndEnd) {
  for (int32_t i = 0; i <= static_cast<int32_t>(Op::kDispatchBackwardForward); ++i) {
    const Op op = static_cast<Op>(i);
    const char* end = IsForward(op) ? "_forward" : i % 2 == 0 ? "_send" : "_recv";
    EXPECT_EQ(OpName(op), std::string(KindName(KindOf(op))) + end);
  }
}

}  // namespace
}  // namespace jax_sm_free
