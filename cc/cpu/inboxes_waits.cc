// The waits of receivers for messages: how long they last, and when they are in vain.

#include <algorithm>
#include <chrono>
#include <map>
#include <utility>

#include "cc/cpu/hop.h"
#include "cc/cpu/inboxes.h"
#include "cc/fault_texts.h"
#include "cc/tiers.h"

namespace jax_sm_free {

Fault Inboxes::FaultOfWait(const Inbox& inbox, int32_t member, Fault fault) const {
  fault.op = OpName(inbox.op);
  fault.rank = RankOf(member);
  fault.exchange = inbox.exchange.Describe();
  NameNodes(config_, fault);
  return fault;
}

// Counts the wait of a receiver for a message that has come now, or never will.
void Inboxes::CountWait(const Inbox& inbox, int32_t member, int32_t carrier) {
  waits_.Add(member, carrier, Watchdog::Clock::now() - inbox.messages_since);
}

std::vector<int64_t> Inboxes::WaitedNanoseconds(int32_t member) const {
  const std::lock_guard lock(mutex_);
  return waits_.Of(member);
}

std::vector<int32_t> Inboxes::MissingRanks(const ExchangeKey& key, const Inbox& inbox,
                                           int32_t rank) const {
  std::vector<bool> missing(config_.ep_size);
  for (int32_t number = 0; number < config_.ep_size; ++number) {
    if (inbox.arrived[number] || !Comes(config_, key.hop, number, rank)) continue;
    missing[CarrierOf(config_, key.hop, number, rank)] = true;
  }
  std::vector<int32_t> ranks;
  for (int32_t each = 0; each < config_.ep_size; ++each) {
    if (missing[each]) ranks.push_back(each);
  }
  return ranks;
}

bool Inboxes::OwesMore(const ExchangeKey& key, const Inbox& inbox, int32_t rank,
                       int32_t number) const {
  if (!CarriesForOthers(key.hop)) return false;
  for (int32_t node = 0; node < config_.num_nodes; ++node) {
    const int32_t other = RankAt(config_, node, PlaceInNode(config_, number));
    if (!inbox.arrived[other] && Comes(config_, key.hop, other, rank)) return true;
  }
  return false;
}

std::optional<Fault> Inboxes::LossOf(const ExchangeKey& key, const Inbox& inbox,
                                     int32_t member) const {
  const int32_t first = member - RankOf(member);
  for (const int32_t rank : MissingRanks(key, inbox, RankOf(member))) {
    const Loss& loss = losses_[first + rank];
    if (key.run < loss.end) return FaultOfWait(inbox, member, NothingComes(rank, loss.reason));
  }
  return std::nullopt;
}

void Inboxes::Lose(int32_t member, const std::string& reason, int64_t end) {
  std::map<int64_t, Fault> faults;  // by run
  {
    const std::lock_guard lock(mutex_);
    if (end <= losses_[member].end) return;
    losses_[member] = {end, reason};
    const int32_t group = GroupOf(member);
    if (end == kForEver) all_groups_.Lose(group);
    for (const auto& [key, round] : rounds_[group]) {
      for (int32_t rank = 0; rank < config_.ep_size; ++rank) {
        const Inbox& inbox = round.inboxes[rank];
        if (!inbox.receiver) continue;
        if (auto fault = LossOf(key, inbox, group * config_.ep_size + rank)) {
          faults.emplace(key.run, *fault);
        }
      }
    }
  }
  for (const auto& [run, fault] : faults) Fail(run, fault);
}

void Inboxes::ArmTimer(Inbox& inbox, int32_t member, double waited) {
  const double timeout_s = TimeoutOf(config_, inbox.exchange.key.hop);
  const double until =
      waited < kSlowWaitSeconds ? std::min(kSlowWaitSeconds, timeout_s) : timeout_s;
  auto expire = [weak = weak_from_this(), key = inbox.exchange.key, member, until] {
    if (const std::shared_ptr<Inboxes> self = weak.lock()) self->OnTimer(key, member, until);
  };
  inbox.timer = Watchdog::Get().Start(std::chrono::duration<double>(until - waited), expire);
}

void Inboxes::OnTimer(const ExchangeKey& key, int32_t member, double waited) {
  Fault fault;
  {
    const std::lock_guard lock(mutex_);
    Inbox* inbox = FindReceiver(key, member);
    if (inbox == nullptr || IsFull(key, *inbox)) return;
    fault = FaultOfWait(*inbox, member,
                        MissingMessages(MissingRanks(key, *inbox, RankOf(member)),
                                        NumCarriers(config_, key.hop), config_.timeout_s, waited));
    if (waited < TimeoutOf(config_, key.hop)) {
      TellSlowWait(fault);
      ArmTimer(*inbox, member, waited);
      return;
    }
  }
  Fail(key.run, fault);
}

}  // namespace jax_sm_free
