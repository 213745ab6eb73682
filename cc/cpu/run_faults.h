// The runs that have failed, each with its first fault.

#ifndef JAX_SM_FREE_CC_CPU_RUN_FAULTS_H_
#define JAX_SM_FREE_CC_CPU_RUN_FAULTS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>

#include "cc/fault.h"

namespace jax_sm_free {

class RunFaults {
 public:
  // The fault that ended `run`, or every run; nullopt for a run that goes on.
  std::optional<Fault> Of(int64_t run) const {
    if (of_all_) return of_all_;
    const auto found = by_run_.find(run);
    if (found == by_run_.end()) return std::nullopt;
    return found->second;
  }

  // Whether this is the first fault of `run`.
  bool Add(int64_t run, const Fault& fault) {
    if (of_all_ || !by_run_.emplace(run, fault).second) return false;
    // Runs are numbered upwards. A rank that is so late that its run is forgotten gets a timeout.
    if (by_run_.size() > kMaxRuns) by_run_.erase(by_run_.begin());
    return true;
  }

  // Ends every run, those to come, too.
  void AddForAll(const Fault& fault) { of_all_ = fault; }

 private:
  static constexpr size_t kMaxRuns = 1024;

  std::map<int64_t, Fault> by_run_;
  std::optional<Fault> of_all_;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_RUN_FAULTS_H_
