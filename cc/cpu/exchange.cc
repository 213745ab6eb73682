#include "cc/cpu/exchange.h"

#include <bit>
#include <utility>

#include "cc/fault_texts.h"

namespace jax_sm_free {

size_t ExchangeKeyHash::operator()(const ExchangeKey& key) const {
  constexpr uint64_t kOdd = 0x9E3779B97F4A7C15U;
  uint64_t hash = 0;
  for (const int64_t part : {key.run, key.call_site, key.count, static_cast<int64_t>(key.hop)}) {
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
  if (slot >= config_.num_slots) return Refuse(op, TooManySendsOfKind(config_.num_slots, kind));
  slots |= uint64_t{1} << slot;
  const Exchange exchange{.sequence = next_sequence_++,
                          .slot = slot,
                          .kind = kind,
                          .key = {state->name, call_site, state->passes[call_site]++},
                          .host_run = run};
  entries_[exchange.sequence] = {exchange};
  return exchange;
}

Result<Ledger::Entry*> Ledger::Find(Op op, const float* words) {
  if (!IsToken(words)) return Refuse(op, NotOneToken(words[kMagicWord]));
  const Token token = ReadToken(words);
  if (token.rank != rank_ || token.buffer != TokenBuffer(buffer_id_)) {
    return Refuse(op, TokenOfAnother(buffer_id_, rank_, token.buffer, token.rank));
  }
  if (token.kind != static_cast<int64_t>(KindOf(op))) {
    return Refuse(op, TokenOfAnotherKind(KindOf(op), static_cast<Kind>(token.kind)));
  }
  const auto found = entries_.find(token.sequence);
  if (found == entries_.end() || found->second.received) {
    return Refuse(op, TokenUsedBefore(token.sequence));
  }
  return &found->second;
}

Result<Exchange> Ledger::Forward(Op op, const float* words) {
  const std::lock_guard lock(mutex_);
  const Result<Entry*> found = Find(op, words);
  if (const Fault* fault = FaultOf(found)) return *fault;
  Entry& entry = *std::get<Entry*>(found);
  if (std::exchange(entry.forwarded, true)) {
    return Refuse(op, ForwardedBefore(entry.exchange.sequence));
  }
  Exchange exchange = entry.exchange;
  exchange.key.hop = FirstHop(exchange.kind);
  return exchange;
}

Result<Exchange> Ledger::Finish(Op op, const float* words) {
  const std::lock_guard lock(mutex_);
  const Result<Entry*> found = Find(op, words);
  if (const Fault* fault = FaultOf(found)) return *fault;
  Entry& entry = *std::get<Entry*>(found);
  if (config_.has_two_tiers() && !entry.forwarded) {
    return Refuse(op, NotForwarded(entry.exchange.sequence));
  }
  entry.received = true;
  Exchange exchange = entry.exchange;
  exchange.key.hop = LastHop(config_, exchange.kind);
  return exchange;
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

void Ledger::WriteToken(const Exchange& exchange, float* words) const {
  jax_sm_free::WriteToken({.sequence = exchange.sequence,
                           .slot = exchange.slot,
                           .kind = static_cast<int64_t>(exchange.kind),
                           .rank = rank_,
                           .buffer = TokenBuffer(buffer_id_)},
                          words);
}

}  // namespace jax_sm_free
