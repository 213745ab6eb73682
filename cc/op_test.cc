#include "cc/op.h"

#include <string>

#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

TEST(OpTest, ANameIsThatOfItsKindAndEnd) {
  for (int32_t i = 0; i <= static_cast<int32_t>(Op::kDispatchBackwardRecv); ++i) {
    const Op op = static_cast<Op>(i);
    EXPECT_EQ(OpName(op), KindName(KindOf(op)) + std::string(i % 2 == 0 ? "_send" : "_recv"));
  }
}

}  // namespace
}  // namespace jax_sm_free
