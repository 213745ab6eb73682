// Whether ranks of several processes do the same.

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

// What a rank says of an exchange: the call behind it, and which start of the program that is. Each
// start of an executable has the next number in its process (XLA's run id); where they begin may
// differ from process to process.
struct Statement {
  std::shared_ptr<const CallSite> site;
  int32_t rank = 0;
  int64_t start = 0;
};

// What the ranks of a group say, held against each other. Ranks that agree on a key but mean
// something else by it would take each other's rows; this makes it a fault. Not thread-safe.
class InStep {
 public:
  // `process_of`: by rank; `here`: this process.
  InStep(std::vector<int32_t> process_of, int32_t here)
      : process_of_(std::move(process_of)), here_(here) {}

  // A fault (without op) if another rank has said otherwise of this key, or if the run is long
  // over.
  std::optional<Fault> Check(const ExchangeKey& key, const Statement& said);

  // What a rank of this process has said of a key; null if none has, or the run is long over.
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

  // More than can be under way at once: XLA has 32 on a device.
  static constexpr size_t kMaxRuns = 128;
  // Starts of two processes that differ by less are counted from the same number: it is a digest of
  // the program, of 32 bits, and differs by chance or not at all.
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
