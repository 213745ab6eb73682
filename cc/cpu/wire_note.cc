#include "cc/cpu/wire_note.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <string_view>

#include "cc/cpu/wire.h"

namespace jax_sm_free {
namespace {

// Change this number with every change of the format below.
constexpr uint64_t kVersion = 0x736d6677'00000004U;

enum class What : int32_t { kMessage, kFinished, kFault };

struct Head {
  uint64_t version = kVersion;
  int64_t buffer = 0;
  int64_t run = 0;
  int64_t call_site = 0;
  int64_t pass = 0;
  int64_t start = 0;
  int64_t executable = 0;
  What what = What::kMessage;
  Hop hop = Hop::kDirect;
  int32_t from = 0;   // src, a group that has finished, or a fault's rank
  int32_t to = 0;     // dst, or a fault's peer
  int32_t count = 0;  // copies of a message's call, or ranks that have finished
  std::array<uint16_t, 4> text_bytes{};
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
  Head head{.buffer = note.buffer};
  const auto set_key = [&head](const ExchangeKey& key) {
    head.run = key.run;
    head.call_site = key.call_site;
    head.pass = key.count;
    head.hop = key.hop;
  };
  if (const auto* fault = std::get_if<Fault>(&note.body)) {
    head.what = What::kFault;
    head.from = fault->rank;
    head.to = fault->peer;
    return Join(head, {fault->op, fault->expected, fault->seen, fault->exchange});
  }
  if (const auto* finished = std::get_if<FinishedNote>(&note.body)) {
    head.what = What::kFinished;
    head.from = finished->group;
    head.count = finished->num_ranks;
    set_key(finished->key);
    return Join(head, {});
  }
  const auto& message = std::get<MessageNote>(note.body);
  set_key(message.key);
  head.start = message.start;
  head.executable = message.site.executable;
  head.from = message.src;
  head.to = message.dst;
  head.count = message.site.num_copies;
  return Join(head, {message.site.program, message.site.call});
}

std::optional<WireNote> Decode(std::span<const std::byte> bytes) {
  Head head;
  if (bytes.size() < sizeof(head)) return std::nullopt;
  std::memcpy(&head, bytes.data(), sizeof(head));
  if (head.version != kVersion) return std::nullopt;
  if (static_cast<uint32_t>(head.hop) >= kNumHops) return std::nullopt;
  Texts texts;
  size_t at = sizeof(head);
  for (size_t i = 0; i < texts.size(); ++i) {
    const size_t size = head.text_bytes[i];
    if (bytes.size() - at < size) return std::nullopt;
    texts[i].assign(reinterpret_cast<const char*>(bytes.data()) + at, size);
    at += size;
  }
  WireNote note{.buffer = head.buffer, .body = {}};
  const ExchangeKey key{head.run, head.call_site, head.pass, head.hop};
  if (head.what == What::kFault) {
    note.body = Fault{.op = texts[0],
                      .rank = head.from,
                      .peer = head.to,
                      .expected = texts[1],
                      .seen = texts[2],
                      .exchange = texts[3]};
  } else if (head.what == What::kFinished) {
    note.body = FinishedNote{.group = head.from, .num_ranks = head.count, .key = key};
  } else {
    note.body = MessageNote{.src = head.from,
                            .dst = head.to,
                            .key = key,
                            .site = {.number = head.call_site,
                                     .program = texts[0],
                                     .call = texts[1],
                                     .num_copies = head.count,
                                     .executable = head.executable},
                            .start = head.start};
  }
  return note;
}

}  // namespace jax_sm_free
