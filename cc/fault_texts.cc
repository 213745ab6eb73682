#include "cc/fault_texts.h"

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <utility>

#include "cc/tiers.h"
#include "cc/token.h"

namespace jax_sm_free {
namespace {

Fault Texts(std::string expected, std::string seen, int32_t peer = -1) {
  return {.peer = peer, .expected = std::move(expected), .seen = std::move(seen), .exchange = {}};
}

std::string RowsOfBytes(int64_t rows, int64_t bytes) {
  return std::to_string(rows) + " rows of " + std::to_string(bytes) + " bytes";
}

std::string OfBuffer(int64_t buffer, int64_t rank) {
  return "of buffer " + std::to_string(buffer) + ", rank " + std::to_string(rank);
}

std::string TokenOf(Kind kind) { return std::string("a ") + KindName(kind) + " token"; }

}  // namespace

std::string DescribeExchange(Kind kind, int64_t sequence, int32_t slot) {
  return std::string(KindName(kind)) + " exchange " + std::to_string(sequence) + ", slot " +
         std::to_string(slot);
}

std::string DescribeSeconds(double seconds) {
  char text[32];
  (void)std::snprintf(text, sizeof(text), "%g s", seconds);
  return text;
}

Fault MissingMessages(const std::vector<int32_t>& missing, int32_t num_ranks, double timeout_s,
                      double waited_s) {
  std::string names;
  for (const int32_t rank : missing) names += (names.empty() ? "" : ", ") + std::to_string(rank);
  const auto num_arrived = num_ranks - static_cast<int32_t>(missing.size());
  return Texts(
      "messages from " + std::to_string(num_ranks) + " ranks within " + DescribeSeconds(timeout_s),
      std::to_string(num_arrived) + " after " + DescribeSeconds(waited_s) + ", none from rank " +
          names,
      missing.front());
}

Fault MissingMessages(const std::vector<bool>& arrived, double timeout_s, double waited_s) {
  std::vector<int32_t> missing;
  for (size_t source = 0; source < arrived.size(); ++source) {
    if (!arrived[source]) missing.push_back(static_cast<int32_t>(source));
  }
  return MissingMessages(missing, static_cast<int32_t>(arrived.size()), timeout_s, waited_s);
}

void NameNodes(const Config& config, Fault& fault) {
  if (!config.has_two_tiers()) return;
  if (fault.rank >= 0) fault.node = NodeOf(config, fault.rank);
  if (fault.peer >= 0) fault.peer_node = NodeOf(config, fault.peer);
}

void TellFault(const Fault& fault) { (void)std::fprintf(stderr, "%s\n", fault.Describe().c_str()); }

void TellSlowWait(const Fault& fault) {
  (void)std::fprintf(stderr, "%s (still waiting)\n", fault.Describe().c_str());
}

Fault TooManySends(int32_t num_slots) {
  return Texts("at most " + std::to_string(num_slots) + " exchanges in flight (num_slots)",
               "one send more without a recv");
}

Fault TooManySendsOfKind(int32_t num_slots, Kind kind) {
  return Texts(
      "at most " + std::to_string(num_slots) + " " + KindName(kind) +
          " exchanges in flight (num_slots)",
      "one send more without a recv: XLA:CPU runs exchanges at once that do not depend on "
      "each other, and jax.checkpoint in a scan with unroll=n makes n such; open the buffer "
      "with a larger num_slots");
}

Fault NotOneToken(float magic) {
  constexpr float kMaxUses = 1024;
  // Sums larger than 2^24 are rounded. So the quotient of a sum of tokens is a whole number, or
  // nearly one.
  const float quotient = magic / kTokenMagic;
  const float uses = std::round(quotient);
  const bool added = uses > 1 && uses < kMaxUses && std::abs(quotient - uses) < 1e-4F;
  return Texts("the token of one send", added ? "the sum of " +
                                                    std::to_string(static_cast<int>(uses)) +
                                                    " tokens: a sent value was used more than once"
                                              : "an array that no send returned");
}

Fault TokenOfAnother(int64_t buffer, int64_t rank, int64_t seen_buffer, int64_t seen_rank) {
  return Texts("a token " + OfBuffer(buffer, rank), "one " + OfBuffer(seen_buffer, seen_rank));
}

Fault TokenOfAnotherKind(Kind expected, Kind seen) {
  return Texts(TokenOf(expected), TokenOf(seen));
}

Fault TokenUsedBefore(int64_t sequence) {
  return Texts("the token of a send not yet received",
               "exchange " + std::to_string(sequence) + ", received before");
}

Fault ForwardedBefore(int64_t sequence) {
  return Texts("one forward of each exchange",
               "a second one of exchange " + std::to_string(sequence));
}

Fault NotForwarded(int64_t sequence) {
  return Texts("the token of a forward, because the buffer has several nodes",
               "exchange " + std::to_string(sequence) + ", which was sent and not forwarded");
}

Fault IndexOutOfRange(int32_t num_experts, int64_t index, int64_t token, int64_t k) {
  return Texts(
      "topk_idx in [-1, " + std::to_string(num_experts) + ")",
      std::to_string(index) + " at token " + std::to_string(token) + ", k " + std::to_string(k));
}

Fault PositionDiffers(int64_t position, int64_t seen) {
  return Texts("shard_map over the buffer's own mesh, where this device has position " +
                   std::to_string(position),
               "position " + std::to_string(seen));
}

Fault LayoutRowsDiffer(int64_t num_rows, int64_t seen) {
  return Texts("layout.rows in [-1, " + std::to_string(num_rows) + ")", std::to_string(seen));
}

Fault NodeTopKDiffers(int32_t num_node_experts, int64_t expert, int64_t row, int64_t k) {
  return Texts(
      "layout.node_topk in [-1, " + std::to_string(num_node_experts) + ")",
      std::to_string(expert) + " at row " + std::to_string(row) + ", k " + std::to_string(k));
}

Fault LayoutCountDiffers(int32_t source, int64_t max_tokens, int64_t seen) {
  return Texts("layout.num_rows_from in [0, " + std::to_string(max_tokens) + "]",
               std::to_string(seen), source);
}

Fault MessageDiffers(int32_t source, int64_t num_rows, int64_t row_bytes, int64_t seen_rows,
                     int64_t seen_row_bytes) {
  return Texts(RowsOfBytes(num_rows, row_bytes), RowsOfBytes(seen_rows, seen_row_bytes), source);
}

Fault NothingComes(int32_t peer, const std::string& reason) {
  return Texts("a message from rank " + std::to_string(peer), reason, peer);
}

Fault SentTwice(int32_t peer) {
  return Texts("one message of an exchange from each rank", "a second one", peer);
}

Fault StepDiffers(int32_t peer, const std::string& here, const std::string& there) {
  return Texts("all ranks to run the same programs in the same order, here " + here, there, peer);
}

Fault NamelessCall() {
  return Texts("a program that was traced for this buffer", "one whose sends have no names");
}

Fault RunIsOver(int32_t peer, int64_t oldest_run, int64_t seen) {
  return Texts("all ranks to run the same programs in the same order, here run " +
                   std::to_string(oldest_run) + " of this buffer or a later one",
               "run " + std::to_string(seen), peer);
}

Fault MalformedMessage(int32_t peer, const std::string& seen) {
  return Texts("a message of this buffer", seen, peer);
}

}  // namespace jax_sm_free
