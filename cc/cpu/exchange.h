// The exchanges of one rank: their names and their states.
//
// An exchange is one all-to-all between the ranks of a group. On each rank it has these states:
//
//             Begin (send)              Finish (recv)            Release (rows unpacked)
//     free  ---------------->  sent  ----------------->  received  ---------------->  free
//                              |  ^                          |
//                 Forward      |  +- in two tiers, between   |
//                 (forward)    +---> Begin and Finish        |
//                                |                           |
//                                +------- MarkFailed --------+------> its run's fault is returned
//
// XLA orders custom calls on the host only by their operands, so nothing here may depend on the
// order of calls. The name of an exchange must be the same on every rank. It is a key of three
// parts: the run of the program, the call site of the send, and how often this run has passed this
// call site. A recv finds its exchange by the token that the send returned, never by order of
// arrival. In two tiers, each of the two rounds of an exchange has a key of its own.
//
// XLA numbers runs. A number is the same for all ranks of a process, and means nothing to another
// process. If the ranks are in several processes, the key has another number of the run: the first
// run that sends through this ledger is 0, the next one is 1, and so on. These numbers are equal in
// all processes, because every rank starts the programs that use a buffer in the same order, and no
// program starts before the one ahead of it has begun to send.
//
// A rank may have at most `num_slots` exchanges of one kind and run that were sent and not yet
// released. Each run has its own slots, because XLA may have several runs in flight at once. Each
// kind has its own slots, because XLA does not order a backward pass behind its forward pass, nor
// behind the parts of the forward pass that are computed again.

#ifndef JAX_SM_FREE_CC_CPU_EXCHANGE_H_
#define JAX_SM_FREE_CC_CPU_EXCHANGE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "cc/cpu/hop.h"
#include "cc/fault.h"
#include "cc/layout.h"
#include "cc/op.h"
#include "cc/token.h"

namespace jax_sm_free {

// How keys name runs: by XLA's number, or by a count.
enum class RunNames { kOfHost, kCounted };

struct ExchangeKey {
  int64_t run = 0;
  int64_t call_site = 0;
  int64_t count = 0;
  Hop hop = Hop::kDirect;  // the round of the exchange

  bool operator==(const ExchangeKey&) const = default;
};

struct ExchangeKeyHash {
  size_t operator()(const ExchangeKey& key) const;
};

// The state of an exchange on one rank.
struct Exchange {
  int64_t sequence = 0;
  int32_t slot = 0;
  Kind kind = Kind::kDispatch;
  ExchangeKey key;
  int64_t host_run = 0;  // XLA's number of the run

  std::string Describe() const;
};

// The exchanges of one rank. Thread-safe.
class Ledger {
 public:
  // `num_slots` and the tiers are those of `config`.
  Ledger(int64_t buffer_id, int32_t rank, const Config& config, RunNames names = RunNames::kOfHost)
      : buffer_id_(buffer_id), rank_(rank), config_(config), names_(names) {}

  // Opens an exchange in `run` at `call_site`. A fault if all slots are taken.
  Result<Exchange> Begin(Op op, int64_t run, int64_t call_site);

  // Takes the exchange that the token `words` names, to forward it. A fault if `words` is not a
  // token, or is a token of another rank or kind, or was used before. The key is that of the round
  // that the op takes. So it is of Finish.
  Result<Exchange> Forward(Op op, const float* words);

  // The same, to receive it. In two tiers it must have been forwarded.
  Result<Exchange> Finish(Op op, const float* words);

  // Frees the slot.
  void Release(const Exchange& exchange);

  // Marks the run as failed. What it holds is forgotten when the table of runs is full.
  void MarkFailed(int64_t run);
  void MarkAllFailed();

  // The runs that Begin has dropped since the last call, because too many runs held exchanges.
  // Their messages still exist, on this rank and on others.
  std::vector<int64_t> TakeLostRuns();

  void WriteToken(const Exchange& exchange, float* words) const;

 private:
  struct Run {
    int64_t name = 0;  // the number of the run in keys
    bool failed = false;
    std::array<uint64_t, kNumKinds> slots{};      // of each kind; bit s: slot s is taken
    std::unordered_map<int64_t, int64_t> passes;  // of each call site

    uint64_t& SlotsOf(Kind kind) { return slots[static_cast<size_t>(kind)]; }
    bool IsIdle() const { return slots == std::array<uint64_t, kNumKinds>{}; }
  };

  struct Entry {
    Exchange exchange;
    bool forwarded = false;
    bool received = false;
  };

  // XLA runs at most 32 computations of a device at once, so older idle runs can be forgotten. If
  // this many runs hold exchanges, their recvs will never come.
  static constexpr size_t kMaxRuns = 64;

  // The state of `run`. Made on the first use of the run. Null if the table is full and no run can
  // be forgotten.
  Run* FindRun(int64_t run);
  void Forget(std::map<int64_t, int64_t>::iterator age);
  Fault Refuse(Op op, Fault fault) const;
  // The exchange of a token. Called with the mutex locked.
  Result<Entry*> Find(Op op, const float* words);

  const int64_t buffer_id_;
  const int32_t rank_;
  const Config config_;
  const RunNames names_;
  std::mutex mutex_;
  bool all_failed_ = false;
  int64_t next_sequence_ = 1;
  int64_t next_age_ = 0;
  std::unordered_map<int64_t, Run> runs_;
  std::map<int64_t, int64_t> ages_;  // age -> run, oldest first
  std::vector<int64_t> lost_runs_;
  std::unordered_map<int64_t, Entry> entries_;  // by sequence number
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_EXCHANGE_H_
