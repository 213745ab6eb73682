#include "cc/cpu/in_step.h"

#include "cc/fault_texts.h"

namespace jax_sm_free {

std::optional<Fault> InStep::Check(const ExchangeKey& key, std::shared_ptr<const CallSite> site,
                                   int32_t rank) {
  if (key.run < oldest_run_) return RunIsOver(rank, oldest_run_, key.run);
  const Statement said{std::move(site), rank};
  Run& run = runs_.try_emplace(key.run, Run{.first = said, .sites = {}}).first->second;
  const std::string what = "run " + std::to_string(key.run) + " of this buffer is ";
  if (run.first.site->program != said.site->program) return Differ(run.first, said, what);
  const Statement& known = run.sites.try_emplace(key.call_site, said).first->second;
  if (*known.site != *said.site) return Differ(known, said, what);
  while (runs_.size() > kMaxRuns && runs_.begin()->first != key.run) {
    runs_.erase(runs_.begin());
    oldest_run_ = runs_.begin()->first;
  }
  return std::nullopt;
}

Fault InStep::Differ(const Statement& first, const Statement& second,
                     const std::string& what) const {
  const bool first_is_here = is_here_[first.rank];
  const Statement& here = first_is_here ? first : second;
  const Statement& there = first_is_here ? second : first;
  Fault fault =
      StepDiffers(there.rank, what + here.site->Describe(), what + there.site->Describe());
  fault.rank = here.rank;
  return fault;
}

std::shared_ptr<const CallSite> InStep::SiteOf(const ExchangeKey& key) const {
  const auto run = runs_.find(key.run);
  if (run == runs_.end()) return nullptr;
  const auto known = run->second.sites.find(key.call_site);
  return known == run->second.sites.end() ? nullptr : known->second.site;
}

}  // namespace jax_sm_free
