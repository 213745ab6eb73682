// The words of each fault: what was expected, and what was seen. All platforms use the same words.
//
// The caller fills in the op, the rank and the exchange.

#ifndef JAX_SM_FREE_CC_FAULT_TEXTS_H_
#define JAX_SM_FREE_CC_FAULT_TEXTS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cc/config.h"
#include "cc/fault.h"
#include "cc/layout.h"

namespace jax_sm_free {

// "dispatch exchange 12, slot 1"
std::string DescribeExchange(Kind kind, int64_t sequence, int32_t slot);

// "1.5 s"
std::string DescribeSeconds(double seconds);

// `missing` has the ranks, at least one, of `num_ranks` that have sent nothing.
Fault MissingMessages(const std::vector<int32_t>& missing, int32_t num_ranks, double timeout_s,
                      double waited_s);
// `arrived` is by source rank. At least one is false.
Fault MissingMessages(const std::vector<bool>& arrived, double timeout_s, double waited_s);

// Adds the nodes of the rank and of the peer, in a group of two tiers.
void NameNodes(const Config& config, Fault& fault);

// Writes a fault to stderr. It may be seen nowhere else: a fault that has ended some ranks leaves
// others waiting for them.
void TellFault(const Fault& fault);

// Writes to stderr that a wait takes long and goes on.
void TellSlowWait(const Fault& fault);

Fault TooManySends(int32_t num_slots);
// The fault of a platform where each kind of exchange has its own slots, and where XLA chooses the
// order of calls.
Fault TooManySendsOfKind(int32_t num_slots, Kind kind);

// The fault of a token whose magic word is not that of one token.
Fault NotOneToken(float magic);
Fault TokenOfAnother(int64_t buffer, int64_t rank, int64_t seen_buffer, int64_t seen_rank);
Fault TokenOfAnotherKind(Kind expected, Kind seen);
Fault TokenUsedBefore(int64_t sequence);
// The faults of a token that was forwarded twice, or received without a forward, in two tiers.
Fault ForwardedBefore(int64_t sequence);
Fault NotForwarded(int64_t sequence);

Fault IndexOutOfRange(int32_t num_experts, int64_t index, int64_t token, int64_t k);
Fault PositionDiffers(int64_t position, int64_t seen);

// The fault of a layout that no dispatch of this buffer has returned.
Fault LayoutRowsDiffer(int64_t num_rows, int64_t seen);
// `row` is that of layout.node_topk.
Fault NodeTopKDiffers(int32_t num_node_experts, int64_t expert, int64_t row, int64_t k);
Fault LayoutCountDiffers(int32_t source, int64_t max_tokens, int64_t seen);

// The fault of a message from a rank that is not in the same exchange.
Fault MessageDiffers(int32_t source, int64_t num_rows, int64_t row_bytes, int64_t seen_rows,
                     int64_t seen_row_bytes);

// Faults that only ranks of other processes can cause.

Fault NothingComes(int32_t peer, const std::string& reason);
Fault SentTwice(int32_t peer);

// The fault of two ranks that do different things in the same step of the same run: this one, and
// `peer`.
Fault StepDiffers(int32_t peer, const std::string& here, const std::string& there);
// The fault of a program that was not lowered for several processes.
Fault NamelessCall();
Fault RunIsOver(int32_t peer, int64_t oldest_run, int64_t seen);

// The fault of a message that does not belong to this buffer.
Fault MalformedMessage(int32_t peer, const std::string& seen);

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_FAULT_TEXTS_H_
