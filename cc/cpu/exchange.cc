#include "cc/cpu/exchange.h"

#include <bit>
#include <utility>

#include "cc/fault_texts.h"

namespace jax_sm_free {

size_t ExchangeKeyHash::operator()(const ExchangeKey& key) const {
  constexpr uint64_t kOdd = 0x9E3779B97F4A7C15U;
  uint64_t hash = 0;
  for (const int64_t part : {key.run, key.call_site, key.count}) {
    hash = (std::rotl(hash, 23) ^ static_cast<uint64_t>(part)) * kOdd;
  }
  return hash;
}

std::string Exchange::Describe() const { return DescribeExchange(kind, sequence, slot); }

Fault Ledger::Refuse(Op op, Fault fault) const {
  fault.op = OpName(op);
  fault.rank = rank_;
  return fault;
}

Ledger::Run* Ledger::FindRun(int64_t run) {
  if (const auto found = runs_.find(run); found != runs_.end()) return &found->second;
  if (runs_.size() >= kMaxRuns) {
    auto age = ages_.begin();
    const auto is_kept = [this](const Run& r) { return !r.IsIdle() && !r.failed && !all_failed_; };
    while (age != ages_.end() && is_kept(runs_[age->second])) ++age;
    if (age == ages_.end()) return nullptr;
    Forget(age);
  }
  Run& made = runs_[run];
  made.name = names_ == RunNames::kOfHost ? run : next_age_;
  ages_[next_age_++] = run;
  return &made;
}

void Ledger::Forget(std::map<int64_t, int64_t>::iterator age) {
  std::erase_if(entries_, [&](const auto& e) { return e.second.exchange.host_run == age->second; });
  runs_.erase(age->second);
  ages_.erase(age);
}

Result<Exchange> Ledger::Begin(Op op, int64_t run, int64_t call_site) {
  const std::lock_guard lock(mutex_);
  Run* state = FindRun(run);
  if (state == nullptr) {
    while (!ages_.empty()) {
      lost_runs_.push_back(ages_.begin()->second);
      Forget(ages_.begin());
    }
    return Refuse(
        op, {.expected = "every sent value to be received",
             .seen = std::to_string(kMaxRuns) + " earlier runs with a sent value that never was",
             .exchange = {}});
  }
  const Kind kind = KindOf(op);
  uint64_t& slots = state->SlotsOf(kind);
  const int32_t slot = std::countr_one(slots);
  if (slot >= num_slots_) return Refuse(op, TooManySendsOfKind(num_slots_, kind));
  slots |= uint64_t{1} << slot;
  const Exchange exchange{.sequence = next_sequence_++,
                          .slot = slot,
                          .kind = kind,
                          .key = {state->name, call_site, state->passes[call_site]++},
                          .host_run = run};
  entries_[exchange.sequence] = {exchange};
  return exchange;
}

Result<Exchange> Ledger::Finish(Op op, const float* token) {
  if (token[kMagicWord] != kTokenMagic) return Refuse(op, NotOneToken(token[kMagicWord]));
  const auto word = [token](TokenWord w) { return static_cast<int64_t>(token[w]); };
  if (word(kRankWord) != rank_ || word(kBufferWord) != buffer_id_ % kTokenWordSize) {
    return Refuse(op, TokenOfAnother(buffer_id_, rank_, word(kBufferWord), word(kRankWord)));
  }
  if (word(kKindWord) != static_cast<int64_t>(KindOf(op))) {
    return Refuse(op, TokenOfAnotherKind(KindOf(op), static_cast<Kind>(word(kKindWord))));
  }
  const int64_t sequence = word(kHighWord) * kTokenWordSize + word(kLowWord);
  const std::lock_guard lock(mutex_);
  const auto found = entries_.find(sequence);
  if (found == entries_.end() || found->second.received) {
    return Refuse(op, TokenUsedBefore(sequence));
  }
  found->second.received = true;
  return found->second.exchange;
}

void Ledger::Release(const Exchange& exchange) {
  const std::lock_guard lock(mutex_);
  if (entries_.erase(exchange.sequence) == 0) return;
  runs_[exchange.host_run].SlotsOf(exchange.kind) &= ~(uint64_t{1} << exchange.slot);
}

void Ledger::MarkFailed(int64_t run) {
  const std::lock_guard lock(mutex_);
  if (Run* state = FindRun(run)) state->failed = true;
}

void Ledger::MarkAllFailed() {
  const std::lock_guard lock(mutex_);
  all_failed_ = true;
}

std::vector<int64_t> Ledger::TakeLostRuns() {
  const std::lock_guard lock(mutex_);
  return std::exchange(lost_runs_, {});
}

void Ledger::WriteToken(const Exchange& exchange, float* token) const {
  const int64_t high_word = exchange.sequence / kTokenWordSize;
  for (int i = 0; i < kTokenSize; ++i) token[i] = 0;
  token[kMagicWord] = kTokenMagic;
  token[kLowWord] = static_cast<float>(exchange.sequence % kTokenWordSize);
  token[kHighWord] = static_cast<float>(high_word);
  token[kSlotWord] = static_cast<float>(exchange.slot);
  token[kKindWord] = static_cast<float>(exchange.kind);
  token[kRankWord] = static_cast<float>(rank_);
  token[kBufferWord] = static_cast<float>(buffer_id_ % kTokenWordSize);
}

}  // namespace jax_sm_free
