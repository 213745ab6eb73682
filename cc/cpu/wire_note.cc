#include "cc/cpu/wire_note.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <string_view>

#include "cc/cpu/wire.h"

namespace jax_sm_free {
namespace {

// Changes with every change of what follows.
constexpr uint64_t kVersion = 0x736d6677'00000002U;

enum class What : int32_t { kMessage, kFault };

struct Head {
  uint64_t version = kVersion;
  int64_t buffer = 0;
  int64_t run = 0;
  int64_t call_site = 0;
  int64_t count = 0;
  int64_t start = 0;
  int64_t executable = 0;
  What what = What::kMessage;
  int32_t group = 0;
  int32_t from = 0;  // src, or a fault's rank
  int32_t to = 0;    // dst, or a fault's peer
  int32_t num_copies = 0;
  std::array<uint16_t, 4> text_bytes{};
  int32_t unused = 0;
};

// A message's program and call, or a fault's op, expected, seen and exchange.
using Texts = std::array<std::string, 4>;
constexpr std::array<size_t, 4> kMaxTextBytes = {kMaxProgramBytes, kMaxCallBytes, 300, 64};
static_assert(sizeof(Head) + kMaxProgramBytes + kMaxCallBytes + 300 + 64 <= Wire::kMaxHeaderBytes);

std::vector<std::byte> Join(Head head, const Texts& texts) {
  std::vector<std::byte> bytes(sizeof(head));
  for (size_t i = 0; i < texts.size(); ++i) {
    const size_t size = std::min(texts[i].size(), kMaxTextBytes[i]);
    const auto* text = reinterpret_cast<const std::byte*>(texts[i].data());
    bytes.insert(bytes.end(), text, text + size);
    head.text_bytes[i] = static_cast<uint16_t>(size);
  }
  std::memcpy(bytes.data(), &head, sizeof(head));
  return bytes;
}

}  // namespace

std::vector<std::byte> Encode(const WireNote& note) {
  Head head{.buffer = note.buffer, .group = note.group};
  if (const auto* fault = std::get_if<Fault>(&note.body)) {
    head.what = What::kFault;
    head.from = fault->rank;
    head.to = fault->peer;
    return Join(head, {fault->op, fault->expected, fault->seen, fault->exchange});
  }
  const auto& message = std::get<MessageNote>(note.body);
  head.run = message.key.run;
  head.call_site = message.key.call_site;
  head.count = message.key.count;
  head.start = message.start;
  head.executable = message.site.executable;
  head.from = message.src;
  head.to = message.dst;
  head.num_copies = message.site.num_copies;
  return Join(head, {message.site.program, message.site.call});
}

std::optional<WireNote> Decode(std::span<const std::byte> bytes) {
  Head head;
  if (bytes.size() < sizeof(head)) return std::nullopt;
  std::memcpy(&head, bytes.data(), sizeof(head));
  if (head.version != kVersion) return std::nullopt;
  Texts texts;
  size_t at = sizeof(head);
  for (size_t i = 0; i < texts.size(); ++i) {
    const size_t size = head.text_bytes[i];
    if (bytes.size() - at < size) return std::nullopt;
    texts[i].assign(reinterpret_cast<const char*>(bytes.data()) + at, size);
    at += size;
  }
  WireNote note{.buffer = head.buffer, .group = head.group, .body = {}};
  if (head.what == What::kFault) {
    note.body = Fault{.op = texts[0],
                      .rank = head.from,
                      .peer = head.to,
                      .expected = texts[1],
                      .seen = texts[2],
                      .exchange = texts[3]};
  } else {
    note.body = MessageNote{.src = head.from,
                            .dst = head.to,
                            .key = {head.run, head.call_site, head.count},
                            .site = {.number = head.call_site,
                                     .program = texts[0],
                                     .call = texts[1],
                                     .num_copies = head.num_copies,
                                     .executable = head.executable},
                            .start = head.start};
  }
  return note;
}

}  // namespace jax_sm_free
