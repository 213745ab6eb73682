#include "cc/cpu/in_step.h"

#include <cstdlib>

#include "cc/fault_texts.h"

namespace jax_sm_free {

std::optional<Fault> InStep::Check(const ExchangeKey& key, const Statement& said) {
  if (key.run < oldest_run_) return RunIsOver(said.rank, oldest_run_, key.run);
  Run& run = runs_.try_emplace(key.run, Run{.first = said, .sites = {}}).first->second;
  const std::string what = "run " + std::to_string(key.run) + " of this buffer is ";
  if (run.first.site->program != said.site->program) return Differ(run.first, said, what);
  Site& site = run.sites.try_emplace(key.call_site, Site{.first = said, .here = {}}).first->second;
  if (*site.first.site != *said.site) return Differ(site.first, said, what);
  if (auto fault = CheckStart(site.first, said, what)) return fault;
  if (IsHere(said)) site.here = said;
  while (runs_.size() > kMaxRuns && runs_.begin()->first != key.run) {
    runs_.erase(runs_.begin());
    oldest_run_ = runs_.begin()->first;
  }
  return std::nullopt;
}

// A run that ends before its first send is not seen: the next run of the rank gets its number. But
// the process of that rank has started the program once more than the others.
std::optional<Fault> InStep::CheckStart(const Statement& first, const Statement& said,
                                        const std::string& what) {
  const Executable one = ExecutableOf(first);
  const Executable other = ExecutableOf(said);
  const auto difference = static_cast<int32_t>(said.start - first.start);  // numbers wrap around
  std::optional<int32_t> expected = numbers_.Difference(one, other);
  if (!expected) {
    expected = std::abs(int64_t{difference}) < kMaxStarts ? 0 : difference;
    numbers_.Learn(one, other, *expected);
  }
  if (difference == *expected) return std::nullopt;
  const int64_t more = int64_t{difference} - *expected;
  Fault fault = Differ(first, said, what);
  const bool is_said = fault.peer == said.rank;
  fault.seen = "it, started " + std::to_string(std::abs(more)) + " times " +
               ((more > 0) == is_said ? "more" : "less") + " often than here";
  return fault;
}

Executable InStep::ExecutableOf(const Statement& said) const {
  return {.process = process_of_[said.rank], .number = said.site->executable};
}

Fault InStep::Differ(const Statement& first, const Statement& second,
                     const std::string& what) const {
  const Statement& here = IsHere(first) ? first : second;
  const Statement& there = IsHere(first) ? second : first;
  Fault fault =
      StepDiffers(there.rank, what + here.site->Describe(), what + there.site->Describe());
  fault.rank = here.rank;
  return fault;
}

const Statement* InStep::SaidHere(const ExchangeKey& key) const {
  const auto run = runs_.find(key.run);
  if (run == runs_.end()) return nullptr;
  const auto site = run->second.sites.find(key.call_site);
  if (site == run->second.sites.end() || !site->second.here) return nullptr;
  return &*site->second.here;
}

}  // namespace jax_sm_free
