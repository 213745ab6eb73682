// Whether ranks of several processes are at the same step of the same program.

#ifndef JAX_SM_FREE_CC_CPU_IN_STEP_H_
#define JAX_SM_FREE_CC_CPU_IN_STEP_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cc/cpu/call_site.h"
#include "cc/cpu/exchange.h"
#include "cc/cpu/start_numbers.h"
#include "cc/fault.h"

namespace jax_sm_free {

// What a rank says of an exchange: the call that it belongs to, and which start of the program it
// belongs to. A process numbers the starts of an executable one after the other (XLA's run id). The
// first number may differ from process to process.
struct Statement {
  std::shared_ptr<const CallSite> site;
  int32_t rank = 0;
  int64_t start = 0;
};

// Compares what the ranks of a group say. Ranks that use one key for different things would take
// each other's rows; this makes it a fault. Not thread-safe.
class InStep {
 public:
  // `process_of` is by rank. `here` is this process.
  InStep(std::vector<int32_t> process_of, int32_t here)
      : process_of_(std::move(process_of)), here_(here) {}

  // A fault (without op) if another rank has said something else of this key, or if the run ended
  // long ago.
  std::optional<Fault> Check(const ExchangeKey& key, const Statement& said);

  // What a rank of this process has said of a key. Null if none has, or if the run ended long ago.
  const Statement* SaidHere(const ExchangeKey& key) const;

 private:
  struct Site {
    Statement first;
    std::optional<Statement> here;
  };
  struct Run {
    Statement first;
    std::unordered_map<int64_t, Site> sites;  // by number
  };

  // More runs than can be in flight at once: XLA has 32 on a device.
  static constexpr size_t kMaxRuns = 128;
  // If the numbers of two starts differ by less than this, both processes count from the same first
  // number. The first number is a digest of the program with 32 bits, so two of them are equal or
  // differ by chance.
  static constexpr int64_t kMaxStarts = 1 << 12;

  std::optional<Fault> CheckStart(const Statement& first, const Statement& said,
                                  const std::string& what);
  Executable ExecutableOf(const Statement& said) const;
  Fault Differ(const Statement& first, const Statement& second, const std::string& what) const;
  bool IsHere(const Statement& said) const { return process_of_[said.rank] == here_; }

  const std::vector<int32_t> process_of_;
  const int32_t here_;
  std::map<int64_t, Run> runs_;
  int64_t oldest_run_ = 0;
  StartNumbers numbers_;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_IN_STEP_H_
