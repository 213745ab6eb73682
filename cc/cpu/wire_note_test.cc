#include "cc/cpu/wire_note.h"

#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "cc/cpu/hop.h"
#include "cc/cpu/wire.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

WireNote Message() {
  return {.buffer = 5,
          .body = MessageNote{.src = 1,
                              .dst = 2,
                              .key = {.run = 10, .call_site = 11, .count = 12, .hop = Hop::kGather},
                              .site = {.number = 11,
                                       .program = "jit_f",
                                       .call = "dispatch_send 0 (float32[6, 7])",
                                       .num_copies = 4,
                                       .executable = 14},
                              .start = 13}};
}

TEST(WireNoteTest, AMessageArrivesAsItWas) {
  const WireNote message = Message();
  const std::optional<WireNote> note = Decode(Encode(message));
  ASSERT_TRUE(note.has_value());
  EXPECT_EQ(note->buffer, 5);
  const auto& body = std::get<MessageNote>(note->body);
  const auto& sent = std::get<MessageNote>(message.body);
  EXPECT_EQ(body.src, sent.src);
  EXPECT_EQ(body.dst, sent.dst);
  EXPECT_EQ(body.key, sent.key);
  EXPECT_EQ(body.site, sent.site);
  EXPECT_EQ(body.site.executable, sent.site.executable);
  EXPECT_EQ(body.start, sent.start);
}

TEST(WireNoteTest, WhoHasFinishedArrivesAsItWas) {
  const ExchangeKey key{.run = 10, .call_site = 11, .count = 12};
  const std::optional<WireNote> note =
      Decode(Encode({.buffer = 5, .body = FinishedNote{.group = 3, .num_ranks = 2, .key = key}}));
  ASSERT_TRUE(note.has_value());
  const auto& body = std::get<FinishedNote>(note->body);
  EXPECT_EQ(body.group, 3);
  EXPECT_EQ(body.num_ranks, 2);
  EXPECT_EQ(body.key, key);
}

TEST(WireNoteTest, AFaultArrivesAsItWas) {
  const Fault fault{.op = "combine_recv",
                    .rank = 3,
                    .peer = 1,
                    .expected = "messages",
                    .seen = "none",
                    .exchange = "exchange 12, slot 1"};
  const std::optional<WireNote> note = Decode(Encode({.buffer = 1, .body = fault}));
  ASSERT_TRUE(note.has_value());
  EXPECT_EQ(std::get<Fault>(note->body).Describe(), fault.Describe());
}

TEST(WireNoteTest, LongTextsOfAFaultAreCutToWhatAWireTakes) {
  const std::string text(5000, 'x');
  const Fault fault{.op = text, .rank = 3, .expected = text, .seen = text, .exchange = text};
  const std::vector<std::byte> bytes = Encode({.buffer = 1, .body = fault});
  EXPECT_LE(bytes.size(), Wire::kMaxHeaderBytes);
  const std::optional<WireNote> note = Decode(bytes);
  ASSERT_TRUE(note.has_value());
  EXPECT_EQ(std::get<Fault>(note->body).expected, std::string(360, 'x'));
}

TEST(WireNoteTest, ARoundThatDoesNotExistIsNoNote) {
  for (const int32_t hop : {-1, kNumHops}) {
    WireNote message = Message();
    std::get<MessageNote>(message.body).key.hop = static_cast<Hop>(hop);
    EXPECT_FALSE(Decode(Encode(message)).has_value()) << "hop " << hop;
  }
}

TEST(WireNoteTest, OtherBytesAreNoNote) {
  std::vector<std::byte> bytes = Encode(Message());
  const std::span<const std::byte> all(bytes);
  EXPECT_FALSE(Decode(all.first(all.size() - 1)).has_value());
  EXPECT_FALSE(Decode(all.first(3)).has_value());
  EXPECT_FALSE(Decode({}).has_value());
  bytes[0] ^= std::byte{1};  // another version
  EXPECT_FALSE(Decode(bytes).has_value());
}

}  // namespace
}  // namespace jax_sm_free
