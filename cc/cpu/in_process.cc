#include "cc/cpu/in_process.h"

#include <algorithm>
#include <cstddef>
#include <utility>

#include "cc/config.h"
#include "cc/cpu/worker_pool.h"
#include "cc/fault_texts.h"

namespace jax_sm_free {
namespace {

constexpr size_t kMaxFailedRuns = 1024;

Fault Of(Op op, const Exchange& exchange, int32_t rank, Fault fault) {
  fault.op = OpName(op);
  fault.rank = rank;
  fault.exchange = exchange.Describe();
  return fault;
}

}  // namespace

std::optional<Fault> InProcess::FaultOfRun(int64_t run) const {
  if (closed_) return closed_;
  const auto found = failed_runs_.find(run);
  if (found == failed_runs_.end()) return std::nullopt;
  return found->second;
}

InProcess::Inbox& InProcess::FindInbox(const ExchangeKey& key, int32_t dst) {
  Round& round = rounds_[key];
  round.inboxes.resize(ep_size_);
  Inbox& inbox = round.inboxes[dst];
  inbox.messages.resize(ep_size_);
  inbox.arrived.resize(ep_size_);
  return inbox;
}

std::vector<Message> InProcess::TakeMessages(const ExchangeKey& key, int32_t dst) {
  Round& round = rounds_[key];
  round.inboxes[dst].done = true;
  std::vector<Message> messages = std::move(round.inboxes[dst].messages);
  if (++round.num_done == num_here_) rounds_.erase(key);
  return messages;
}

std::optional<Fault> InProcess::Begin(Op /*op*/, const Exchange& /*exchange*/, int32_t /*rank*/,
                                      std::shared_ptr<const CallSite> /*site*/) {
  return std::nullopt;  // ranks of one process name an exchange alike
}

std::optional<Fault> InProcess::Send(const ExchangeKey& key, int32_t src, int32_t dst,
                                     Message message) {
  Receiver receiver;
  std::vector<Message> messages;
  {
    const std::lock_guard lock(mutex_);
    if (std::optional<Fault> fault = FaultOfRun(key.run)) return fault;
    Inbox& inbox = FindInbox(key, dst);
    if (inbox.arrived[src]) return SentTwice(src);
    inbox.messages[src] = std::move(message);
    inbox.arrived[src] = true;
    if (++inbox.num_arrived < ep_size_ || !inbox.receiver) return std::nullopt;
    Watchdog::Get().Cancel(inbox.timer);
    receiver = std::move(inbox.receiver);
    messages = TakeMessages(key, dst);
  }
  // std::function wants a copyable task, and messages are not.
  auto shared = std::make_shared<std::vector<Message>>(std::move(messages));
  WorkerPool::Get().Run([receiver, shared] { receiver(std::move(*shared)); });
  return std::nullopt;
}

void InProcess::Receive(Op op, const Exchange& exchange, int32_t dst, Receiver receiver) {
  Arrival arrival;
  std::optional<Fault> loss;
  {
    const std::lock_guard lock(mutex_);
    if (std::optional<Fault> fault = FaultOfRun(exchange.key.run)) {
      arrival = *fault;
    } else {
      Inbox& inbox = FindInbox(exchange.key, dst);
      if (inbox.num_arrived == ep_size_) {
        arrival = TakeMessages(exchange.key, dst);
      } else {
        inbox.op = op;
        inbox.exchange = exchange;
        for (int32_t rank = 0; rank < ep_size_ && !loss; ++rank) loss = LossOf(inbox, dst, rank);
        inbox.receiver = std::move(receiver);
        receiver = nullptr;
        if (!loss) ArmTimer(inbox, dst, 0.0);
      }
    }
  }
  if (loss) Fail(exchange.key.run, *loss);
  if (receiver) receiver(std::move(arrival));
}

std::optional<Fault> InProcess::LossOf(const Inbox& inbox, int32_t dst, int32_t rank) const {
  const Loss& loss = losses_[rank];
  if (inbox.arrived[rank] || inbox.exchange.key.run >= loss.end) return std::nullopt;
  return Of(inbox.op, inbox.exchange, dst, NothingComes(rank, loss.reason));
}

void InProcess::Lose(int32_t rank, const std::string& reason, int64_t end) {
  std::map<int64_t, Fault> faults;  // by run
  {
    const std::lock_guard lock(mutex_);
    if (end <= losses_[rank].end) return;
    losses_[rank] = {end, reason};
    for (const auto& [key, round] : rounds_) {
      for (int32_t dst = 0; dst < ep_size_; ++dst) {
        if (!round.inboxes[dst].receiver) continue;
        if (auto fault = LossOf(round.inboxes[dst], dst, rank)) faults.emplace(key.run, *fault);
      }
    }
  }
  for (const auto& [run, fault] : faults) Fail(run, fault);
}

void InProcess::ArmTimer(Inbox& inbox, int32_t dst, double waited) {
  const double until =
      waited < kSlowWaitSeconds ? std::min(kSlowWaitSeconds, timeout_s_) : timeout_s_;
  auto expire = [weak = weak_from_this(), key = inbox.exchange.key, dst, until] {
    if (const std::shared_ptr<InProcess> self = weak.lock()) self->OnTimer(key, dst, until);
  };
  inbox.timer = Watchdog::Get().Start(std::chrono::duration<double>(until - waited), expire);
}

void InProcess::OnTimer(const ExchangeKey& key, int32_t dst, double waited) {
  Fault fault;
  {
    const std::lock_guard lock(mutex_);
    const auto found = rounds_.find(key);
    if (found == rounds_.end() || !found->second.inboxes[dst].receiver) return;
    Inbox& inbox = found->second.inboxes[dst];
    fault = Of(inbox.op, inbox.exchange, dst, MissingMessages(inbox.arrived, timeout_s_, waited));
    if (waited < timeout_s_) {
      TellSlowWait(fault);
      ArmTimer(inbox, dst, waited);
      return;
    }
  }
  Fail(key.run, fault);
}

std::vector<InProcess::Receiver> InProcess::TakeReceivers(
    const std::function<bool(int64_t run)>& of_run) {
  std::vector<Receiver> receivers;
  for (auto it = rounds_.begin(); it != rounds_.end();) {
    if (!of_run(it->first.run)) {
      ++it;
      continue;
    }
    for (Inbox& inbox : it->second.inboxes) {
      if (!inbox.receiver) continue;
      Watchdog::Get().Cancel(inbox.timer);
      receivers.push_back(std::move(inbox.receiver));
    }
    it = rounds_.erase(it);
  }
  return receivers;
}

void InProcess::Fail(int64_t run, const Fault& fault) {
  std::vector<Receiver> receivers;
  {
    const std::lock_guard lock(mutex_);
    if (closed_ || !failed_runs_.emplace(run, fault).second) return;
    // Runs are numbered upwards: a rank this late would find out by its own timeout.
    if (failed_runs_.size() > kMaxFailedRuns) failed_runs_.erase(failed_runs_.begin());
    receivers = TakeReceivers([run](int64_t r) { return r == run; });
    on_fail_(run, fault);
  }
  for (Receiver& receiver : receivers) {
    WorkerPool::Get().Run([receiver = std::move(receiver), fault] { receiver(fault); });
  }
}

void InProcess::Close(const Fault& fault) {
  std::vector<Receiver> receivers;
  {
    const std::lock_guard lock(mutex_);
    closed_ = fault;
    receivers = TakeReceivers([](int64_t) { return true; });
  }
  for (Receiver& receiver : receivers) {
    WorkerPool::Get().Run([receiver = std::move(receiver), fault] { receiver(fault); });
  }
}

}  // namespace jax_sm_free
