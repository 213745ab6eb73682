// One rank's exchanges: who they are, and in which state.
//
// An exchange is one all-to-all round between the ranks of a group. On each rank it goes through
//
//             Begin (send)              Finish (recv)            Release (rows unpacked)
//     free  ---------------->  sent  ----------------->  received  ---------------->  free
//                                |                           |
//                                +------- MarkFailed --------+------> its run's fault is returned
//
// The host keeps no order among custom calls but that of their operands, so that nothing here may
// depend on the order of calls. What is the same on every rank, and hence names an exchange, is its
// key: the run of the program, the call site of the send, and how often this run passed this site.
// A recv finds its exchange by the token that the send returned, never by order of arrival.
//
// What the host calls a run is the same for all ranks of a process, and means nothing to another
// process. Where ranks are in several, the key has the number of the run instead: the first run
// that sends through this ledger is 0, and so on. That holds because every rank starts the programs
// that use a buffer in the same order, and none starts before the one ahead of it has begun to
// send.
//
// At most `num_slots` exchanges of one kind and run may be sent and not yet released on a rank.
// Runs are counted apart, because a host may have several in flight at once; and kinds, because
// nothing orders a backward pass behind the forward pass there, nor behind what it repeats of it.

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

#include "cc/fault.h"
#include "cc/layout.h"
#include "cc/op.h"
#include "cc/token.h"

namespace jax_sm_free {

// What runs are called in keys.
enum class RunNames { kOfHost, kCounted };

struct ExchangeKey {
  int64_t run = 0;
  int64_t call_site = 0;
  int64_t count = 0;

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
  int64_t host_run = 0;  // as the host calls it

  std::string Describe() const;
};

// The exchanges of one rank. Thread-safe.
class Ledger {
 public:
  Ledger(int64_t buffer_id, int32_t rank, int32_t num_slots, RunNames names = RunNames::kOfHost)
      : buffer_id_(buffer_id), rank_(rank), num_slots_(num_slots), names_(names) {}

  // Opens an exchange in `run` at `call_site`. A fault if all slots are taken.
  Result<Exchange> Begin(Op op, int64_t run, int64_t call_site);

  // Takes the exchange that the token `words` names for receiving. A fault if the token is none, is
  // another rank's, is of another kind, or was used before.
  Result<Exchange> Finish(Op op, const float* words);

  // Gives the slot back.
  void Release(const Exchange& exchange);

  // What `run` still holds is forgotten once the table of runs is full.
  void MarkFailed(int64_t run);
  void MarkAllFailed();

  // The runs that Begin has given up since the last call, because so many held exchanges. Their
  // messages are still there, on this rank and on others.
  std::vector<int64_t> TakeLostRuns();

  void WriteToken(const Exchange& exchange, float* words) const;

 private:
  struct Run {
    int64_t name = 0;  // in keys
    bool failed = false;
    std::array<uint64_t, kNumKinds> slots{};      // of each kind; bit s: slot s is taken
    std::unordered_map<int64_t, int64_t> passes;  // of each call site

    uint64_t& SlotsOf(Kind kind) { return slots[static_cast<size_t>(kind)]; }
    bool IsIdle() const { return slots == std::array<uint64_t, kNumKinds>{}; }
  };

  struct Entry {
    Exchange exchange;
    bool received = false;
  };

  // XLA runs at most 32 computations of a device at once; older idle runs are forgotten, and so
  // many runs that hold exchanges have lost them.
  static constexpr size_t kMaxRuns = 64;

  // The state of `run`, made on its first use; null where no run can be forgotten for it.
  Run* FindRun(int64_t run);
  void Forget(std::map<int64_t, int64_t>::iterator age);
  Fault Refuse(Op op, Fault fault) const;

  const int64_t buffer_id_;
  const int32_t rank_;
  const int32_t num_slots_;
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
