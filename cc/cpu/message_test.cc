#include "cc/cpu/message.h"

#include <cstddef>
#include <optional>
#include <utility>

#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

constexpr Config kConfig{
    .ep_size = 2, .num_experts = 6, .top_k = 2, .max_tokens = 5, .row_bytes = 20};
constexpr MessageHeader kHeader{
    .kind = static_cast<int32_t>(Kind::kDispatch), .num_rows = 4, .row_bytes = 12};

class MessageTest : public ::testing::Test {
 protected:
  Message Make() { return {pool_.Take(), kConfig, kHeader}; }

  BlockPool pool_{MaxMessageBytes(kConfig)};
};

TEST_F(MessageTest, KeepsItsHeader) {
  const Message message = Make();
  EXPECT_EQ(message.header().kind, kHeader.kind);
  EXPECT_EQ(message.header().num_rows, kHeader.num_rows);
  EXPECT_EQ(message.header().row_bytes, kHeader.row_bytes);
}

TEST_F(MessageTest, PartsLieWhereTheLayoutSays) {
  const Message message = Make();
  const MessageLayout layout = LayoutOf(kConfig, kHeader);
  const auto* start = reinterpret_cast<const std::byte*>(&message.header());
  const auto offset = [start](const void* part) {
    return static_cast<const std::byte*>(part) - start;
  };
  EXPECT_EQ(offset(message.rows_per_expert()), layout.rows_per_expert);
  EXPECT_EQ(offset(message.local_expert()), layout.local_expert);
  EXPECT_EQ(offset(message.position()), layout.position);
  EXPECT_EQ(offset(message.weight()), layout.weight);
  EXPECT_EQ(offset(message.row(0)), layout.rows);
  EXPECT_EQ(offset(message.row(3)), layout.rows + 3 * layout.row_stride);
}

TEST_F(MessageTest, GivesItsBlockBack) {
  for (int i = 0; i < 10; ++i) Make();
  EXPECT_EQ(pool_.num_blocks(), 1);
}

TEST_F(MessageTest, KeepsItsBlockWhenMoved) {
  Message first = Make();
  const std::byte* const rows = first.row(0);
  const Message second = std::move(first);
  EXPECT_EQ(second.row(0), rows);
  const Message third = Make();
  EXPECT_NE(third.row(0), rows);
}

TEST_F(MessageTest, CheckAcceptsTheExpectedRows) {
  EXPECT_FALSE(CheckMessage(Make(), 1, 4, 12).has_value());
}

TEST_F(MessageTest, CheckNamesTheSourceAndBothSizes) {
  const std::optional<Fault> fault = CheckMessage(Make(), 1, 3, 12);
  ASSERT_TRUE(fault.has_value());
  EXPECT_EQ(fault->peer, 1);
  EXPECT_EQ(fault->expected, "3 rows of 12 bytes");
  EXPECT_EQ(fault->seen, "4 rows of 12 bytes");
}

TEST_F(MessageTest, CheckRefusesRowsOfAnotherWidth) {
  EXPECT_TRUE(CheckMessage(Make(), 1, 4, 20).has_value());
}

}  // namespace
}  // namespace jax_sm_free
