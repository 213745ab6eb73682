// What each fault expected and saw, in words: all platforms say the same of the same fault.
//
// Op, rank and exchange are the caller's to add.

#ifndef JAX_SM_FREE_CC_FAULT_TEXTS_H_
#define JAX_SM_FREE_CC_FAULT_TEXTS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cc/fault.h"
#include "cc/layout.h"

namespace jax_sm_free {

// "dispatch exchange 12, slot 1"
std::string DescribeExchange(Kind kind, int64_t sequence, int32_t slot);

// "1.5 s"
std::string DescribeSeconds(double seconds);

// `arrived`: by source; one at least has not.
Fault MissingMessages(const std::vector<bool>& arrived, double timeout_s, double waited_s);

// Tells on stderr what has gone wrong, which may be seen nowhere else: ranks that a fault has not
// reached may wait for those that it has ended.
void TellFault(const Fault& fault);

// Tells on stderr that a wait goes on, though slowly.
void TellSlowWait(const Fault& fault);

Fault TooManySends(int32_t num_slots);
// Where each kind has slots of its own, and XLA starts what it can.
Fault TooManySendsOfKind(int32_t num_slots, Kind kind);

// A token whose magic word is not that of one token.
Fault NotOneToken(float magic);
Fault TokenOfAnother(int64_t buffer, int64_t rank, int64_t seen_buffer, int64_t seen_rank);
Fault TokenOfAnotherKind(Kind expected, Kind seen);
Fault TokenUsedBefore(int64_t sequence);

Fault IndexOutOfRange(int32_t num_experts, int64_t index, int64_t token, int64_t k);
Fault PositionDiffers(int64_t position, int64_t seen);

// Of a layout that no dispatch of this buffer returned.
Fault LayoutRowsDiffer(int64_t num_rows, int64_t seen);
Fault LayoutCountDiffers(int32_t source, int64_t max_tokens, int64_t seen);

// A message from a rank out of step.
Fault MessageDiffers(int32_t source, int64_t num_rows, int64_t row_bytes, int64_t seen_rows,
                     int64_t seen_row_bytes);

// What only ranks of other processes can do wrong.

Fault NothingComes(int32_t peer, const std::string& reason);
Fault SentTwice(int32_t peer);

// What this rank and `peer` take for the same step of the same run.
Fault StepDiffers(int32_t peer, const std::string& here, const std::string& there);
// A program that was not lowered for several processes.
Fault NamelessCall();
Fault RunIsOver(int32_t peer, int64_t oldest_run, int64_t seen);

// A message that is none of this buffer's.
Fault MalformedMessage(int32_t peer, const std::string& seen);

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_FAULT_TEXTS_H_
