#include "cc/cpu/inboxes.h"

#include <chrono>
#include <cstddef>
#include <utility>

#include "cc/config.h"
#include "cc/cpu/worker_pool.h"
#include "cc/fault_texts.h"

namespace jax_sm_free {
namespace {

using Seconds = std::chrono::duration<double>;

}  // namespace

Inboxes::Inboxes(const Config& config, std::vector<int32_t> num_here, OnFail on_fail)
    : config_(config),
      num_here_(std::move(num_here)),
      sees_all_ranks_(num_here_.size() > 1 || num_here_.front() == config.ep_size),
      on_fail_(std::move(on_fail)),
      all_groups_(static_cast<int32_t>(num_here_.size()), config.ep_size,
                  TimeoutOf(config, LastHop(config, Kind::kDispatch))),
      rounds_(num_here_.size()),
      losses_(num_here_.size() * config.ep_size),
      waits_(losses_.size(), config.ep_size) {}

Inboxes::Round& Inboxes::FindRound(const ExchangeKey& key, int32_t group) {
  const auto [entry, is_new] = rounds_[group].try_emplace(key);
  Round& round = entry->second;
  if (!is_new) return round;
  round.waits_for_groups = sees_all_ranks_;
  round.inboxes.resize(config_.ep_size);
  for (Inbox& inbox : round.inboxes) {
    inbox.messages.resize(config_.ep_size);
    inbox.arrived.resize(config_.ep_size);
  }
  return round;
}

// Null if no receiver waits there.
Inboxes::Inbox* Inboxes::FindReceiver(const ExchangeKey& key, int32_t member) {
  Rounds& rounds = rounds_[GroupOf(member)];
  const auto found = rounds.find(key);
  if (found == rounds.end()) return nullptr;
  Inbox& inbox = found->second.inboxes[RankOf(member)];
  return inbox.receiver ? &inbox : nullptr;
}

std::vector<Message> Inboxes::TakeMessages(const ExchangeKey& key, int32_t member) {
  const int32_t group = GroupOf(member);
  Round& round = rounds_[group][key];
  std::vector<Message> messages = std::move(round.inboxes[RankOf(member)].messages);
  if (++round.num_done == num_here_[group]) rounds_[group].erase(key);
  return messages;
}

std::optional<Fault> Inboxes::Send(const ExchangeKey& key, int32_t src, int32_t dst,
                                   Message message) {
  std::vector<Delivery> deliveries;
  {
    const std::lock_guard lock(mutex_);
    if (std::optional<Fault> fault = run_faults_.Of(key.run)) return fault;
    if (auto fault = Put(key, src, dst, std::move(message))) return fault;
    TakeIfFull(key, dst, deliveries);
  }
  Deliver(std::move(deliveries));
  return std::nullopt;
}

// Puts a message into the inbox of `dst`.
std::optional<Fault> Inboxes::Put(const ExchangeKey& key, int32_t src, int32_t dst,
                                  Message message) {
  Inbox& inbox = FindRound(key, GroupOf(dst)).inboxes[RankOf(dst)];
  const int32_t number = RankOf(src);
  const int32_t carrier = CarrierOf(config_, key.hop, number, RankOf(dst));
  if (inbox.arrived[number]) return SentTwice(carrier);
  inbox.messages[number] = std::move(message);
  inbox.arrived[number] = true;
  ++inbox.num_arrived;
  if (!inbox.receiver) return std::nullopt;
  if (!OwesMore(key, inbox, RankOf(dst), number)) CountWait(inbox, dst, carrier);
  return std::nullopt;
}

// Takes the messages of a rank that already receives, if all are there.
void Inboxes::TakeIfFull(const ExchangeKey& key, int32_t member,
                         std::vector<Delivery>& deliveries) {
  Inbox* inbox = FindReceiver(key, member);
  if (inbox == nullptr || !IsFull(key, *inbox)) return;
  Watchdog::Get().Cancel(inbox->timer);
  const int32_t group = GroupOf(member);
  if (MustWaitForGroups(rounds_[group][key], key, member)) return;
  TakeFullInboxes(key, group, deliveries);
}

std::optional<Fault> Inboxes::SendAll(const ExchangeKey& key, int32_t member,
                                      std::span<const Parcel> parcels, const Pack& pack,
                                      bool finishes) {
  std::vector<Message> messages;
  messages.reserve(parcels.size());
  for (const Parcel& parcel : parcels) messages.push_back(pack(parcel));
  std::vector<Delivery> deliveries;
  {
    // Once for all messages: every rank of the process wants this lock.
    const std::lock_guard lock(mutex_);
    if (std::optional<Fault> fault = run_faults_.Of(key.run)) return fault;
    const int32_t first = member - RankOf(member);
    for (size_t i = 0; i < parcels.size(); ++i) {
      const Parcel& parcel = parcels[i];
      auto fault = Put(key, first + parcel.number, first + parcel.dst, std::move(messages[i]));
      if (fault) return fault;
    }
    // First counts this rank: if all ranks are through, none has to wait for other groups.
    if (finishes) CountFinished(key, GroupOf(member), 1, deliveries);
    for (const Parcel& parcel : parcels) TakeIfFull(key, first + parcel.dst, deliveries);
  }
  Deliver(std::move(deliveries));
  return std::nullopt;
}

void Inboxes::Finish(const ExchangeKey& key, int32_t member) {
  AddFinished(key, GroupOf(member), 1);
}

void Inboxes::AddFinished(const ExchangeKey& key, int32_t group, int32_t num) {
  std::vector<Delivery> deliveries;
  {
    const std::lock_guard lock(mutex_);
    if (!run_faults_.Of(key.run)) CountFinished(key, group, num, deliveries);
  }
  Deliver(std::move(deliveries));
}

void Inboxes::CountFinished(const ExchangeKey& key, int32_t group, int32_t num,
                            std::vector<Delivery>& deliveries) {
  if (!sees_all_ranks_ || !all_groups_.Add(key, group, num)) return;
  // All at once: if an exchange fails on one rank, no rank gets its messages.
  for (int32_t each = 0; each < static_cast<int32_t>(rounds_.size()); ++each) {
    TakeFullInboxes(key, each, deliveries);
  }
}

// Only ranks that already receive. Others need not wait when they come.
void Inboxes::TakeFullInboxes(const ExchangeKey& key, int32_t group,
                              std::vector<Delivery>& deliveries) {
  const auto found = rounds_[group].find(key);
  if (found == rounds_[group].end()) return;
  found->second.waits_for_groups = false;
  std::vector<int32_t> ready;
  for (int32_t rank = 0; rank < config_.ep_size; ++rank) {
    const Inbox& inbox = found->second.inboxes[rank];
    if (inbox.receiver && IsFull(key, inbox)) ready.push_back(rank);
  }
  for (const int32_t rank : ready) {  // the last rank may erase the round
    Inbox& inbox = rounds_[group][key].inboxes[rank];
    Watchdog::Get().Cancel(inbox.timer);
    Receiver receiver = std::exchange(inbox.receiver, nullptr);
    deliveries.emplace_back(std::move(receiver), TakeMessages(key, group * config_.ep_size + rank));
  }
}

// Runs receivers on the worker pool. The task also drops the receiver, which may be the last holder
// of a buffer.
void Inboxes::Deliver(std::vector<Delivery> deliveries) {
  for (Delivery& delivery : deliveries) {
    // std::function needs a task that can be copied, and messages can not be copied.
    auto shared = std::make_shared<Delivery>(std::move(delivery));
    WorkerPool::Get().Run([shared = std::move(shared)]() mutable {
      const std::shared_ptr<Delivery> own = std::move(shared);
      own->first(std::move(own->second));
    });
  }
}

void Inboxes::Receive(Op op, const Exchange& exchange, int32_t dst, Receiver receiver) {
  Arrival arrival;
  std::optional<Fault> loss;
  const ExchangeKey& key = exchange.key;
  {
    const std::lock_guard lock(mutex_);
    if (std::optional<Fault> fault = run_faults_.Of(key.run)) {
      arrival = *fault;
    } else {
      Round& round = FindRound(key, GroupOf(dst));
      Inbox& inbox = round.inboxes[RankOf(dst)];
      inbox.op = op;
      inbox.exchange = exchange;
      if (IsFull(key, inbox) && !MustWaitForGroups(round, key, dst)) {
        arrival = TakeMessages(key, dst);
      } else {
        inbox.receiver = std::move(receiver);
        receiver = nullptr;
        if (!IsFull(key, inbox)) inbox.messages_since = Watchdog::Clock::now();
        loss = LossOf(key, inbox, dst);
        if (!loss && !IsFull(key, inbox)) ArmTimer(inbox, dst, 0.0);
      }
    }
  }
  if (loss) Fail(key.run, *loss);
  if (receiver) receiver(std::move(arrival));
}

// Whether a rank that has the messages of its own group must wait for other groups. If so, a timer
// asks again.
bool Inboxes::MustWaitForGroups(Round& round, const ExchangeKey& key, int32_t member) {
  if (!round.waits_for_groups) return false;
  Inbox& inbox = round.inboxes[RankOf(member)];
  const Watchdog::Clock::time_point now = Watchdog::Clock::now();
  if (inbox.since == Watchdog::Clock::time_point{}) inbox.since = now;
  const double seconds = all_groups_.SecondsToWait(key, Seconds(now - inbox.since).count());
  round.waits_for_groups = seconds > 0;
  if (!round.waits_for_groups) return false;
  auto expire = [weak = weak_from_this(), key, member] {
    if (const std::shared_ptr<Inboxes> self = weak.lock()) self->OnGroupsTimer(key, member);
  };
  inbox.timer = Watchdog::Get().Start(Seconds(seconds), expire);
  return true;
}

void Inboxes::OnGroupsTimer(const ExchangeKey& key, int32_t member) {
  std::vector<Delivery> deliveries;
  {
    const std::lock_guard lock(mutex_);
    if (FindReceiver(key, member) == nullptr) return;
    const int32_t group = GroupOf(member);
    if (MustWaitForGroups(rounds_[group][key], key, member)) return;
    TakeFullInboxes(key, group, deliveries);
  }
  Deliver(std::move(deliveries));
}

std::vector<Inboxes::Delivery> Inboxes::TakeReceivers(
    const std::function<bool(int64_t run)>& of_run, const Fault& fault) {
  std::vector<Delivery> deliveries;
  for (int32_t group = 0; group < static_cast<int32_t>(rounds_.size()); ++group) {
    Rounds& rounds = rounds_[group];
    for (auto it = rounds.begin(); it != rounds.end();) {
      if (!of_run(it->first.run)) {
        ++it;
        continue;
      }
      for (int32_t rank = 0; rank < config_.ep_size; ++rank) {
        Inbox& inbox = it->second.inboxes[rank];
        if (!inbox.receiver) continue;
        const ExchangeKey& key = it->first;
        for (const int32_t carrier : MissingRanks(key, inbox, rank)) {
          CountWait(inbox, group * config_.ep_size + rank, carrier);
        }
        Watchdog::Get().Cancel(inbox.timer);
        deliveries.emplace_back(std::move(inbox.receiver), fault);
      }
      it = rounds.erase(it);
    }
  }
  return deliveries;
}

void Inboxes::Fail(int64_t run, const Fault& fault) {
  std::vector<Delivery> deliveries;
  {
    const std::lock_guard lock(mutex_);
    if (!run_faults_.Add(run, fault)) return;
    deliveries = TakeReceivers([run](int64_t r) { return r == run; }, fault);
    on_fail_(run, fault);
  }
  Deliver(std::move(deliveries));
}

void Inboxes::Close(const Fault& fault) {
  std::vector<Delivery> deliveries;
  {
    const std::lock_guard lock(mutex_);
    run_faults_.AddForAll(fault);
    deliveries = TakeReceivers([](int64_t) { return true; }, fault);
  }
  Deliver(std::move(deliveries));
}

}  // namespace jax_sm_free
