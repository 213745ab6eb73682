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

#include "cc/call_site.h"
#include "cc/exchange.h"
#include "cc/fault.h"

namespace jax_sm_free {

// What the ranks of a group say that they run, held against each other: the program of each run,
// and the call behind each call site of it. Ranks that agree on a key but mean something else by it
// would take each other's rows; this makes it a fault. Not thread-safe.
class InStep {
 public:
  // `is_here`: for each rank, whether it is of this process.
  explicit InStep(std::vector<bool> is_here) : is_here_(std::move(is_here)) {}

  // `rank` says that `key` is of `site`. A fault (without op) if another rank said otherwise, or if
  // the run is long over.
  std::optional<Fault> Check(const ExchangeKey& key, std::shared_ptr<const CallSite> site,
                             int32_t rank);

  // The site behind a key that was checked; null once its run is long over.
  std::shared_ptr<const CallSite> SiteOf(const ExchangeKey& key) const;

 private:
  struct Statement {
    std::shared_ptr<const CallSite> site;
    int32_t rank = 0;  // the first that said so
  };
  struct Run {
    Statement first;
    std::unordered_map<int64_t, Statement> sites;  // by number
  };

  // More than can be under way at once: XLA has 32 on a device.
  static constexpr size_t kMaxRuns = 128;

  Fault Differ(const Statement& first, const Statement& second, const std::string& what) const;

  const std::vector<bool> is_here_;
  std::map<int64_t, Run> runs_;
  int64_t oldest_run_ = 0;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_IN_STEP_H_
