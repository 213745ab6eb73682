#include "cc/cpu/between_processes.h"

#include <set>
#include <utility>

#include "cc/cpu/worker_pool.h"
#include "cc/fault_texts.h"

namespace jax_sm_free {
namespace {

std::vector<bool> RanksHere(const BetweenProcesses::Place& place) {
  std::vector<bool> is_here;
  for (const int32_t process : place.process_of) is_here.push_back(process == place.process);
  return is_here;
}

}  // namespace

std::shared_ptr<BetweenProcesses> BetweenProcesses::Make(Place place, const Config& config,
                                                         Wire* wire, OnEnd on_end) {
  std::shared_ptr<BetweenProcesses> made(
      new BetweenProcesses(std::move(place), config, wire, std::move(on_end)));
  int32_t num_here = 0;
  for (const bool here : RanksHere(made->place_)) num_here += here ? 1 : 0;
  // The inboxes call this while they are locked.
  const auto on_fail = [weak = made->weak_from_this()](int64_t /*run*/, const Fault& fault) {
    WorkerPool::Get().Run([weak, fault] {
      if (const auto self = weak.lock()) self->End(fault, /*tell=*/true);
    });
  };
  made->inboxes_ = std::make_shared<InProcess>(config.ep_size, num_here, config.timeout_s, on_fail);
  return made;
}

BetweenProcesses::BetweenProcesses(Place place, const Config& config, Wire* wire, OnEnd on_end)
    : place_(std::move(place)),
      config_(config),
      wire_(wire),
      on_end_(std::move(on_end)),
      in_step_(RanksHere(place_)) {}

std::optional<Fault> BetweenProcesses::Begin(Op op, const Exchange& exchange, int32_t rank,
                                             std::shared_ptr<const CallSite> site) {
  std::optional<Fault> fault;
  {
    const std::lock_guard lock(mutex_);
    if (ended_) return ended_;
    fault = in_step_.Check(exchange.key, std::move(site), rank);
  }
  if (!fault) return std::nullopt;
  fault->op = OpName(op);
  fault->exchange = exchange.Describe();
  End(*fault, /*tell=*/true);
  return fault;
}

std::optional<Fault> BetweenProcesses::Send(const ExchangeKey& key, int32_t src, int32_t dst,
                                            Message message) {
  if (IsHere(dst)) return inboxes_->Send(key, src, dst, std::move(message));
  std::shared_ptr<const CallSite> site;
  {
    const std::lock_guard lock(mutex_);
    if (ended_) return ended_;
    site = in_step_.SiteOf(key);
  }
  const std::vector<std::byte> header =
      Encode({place_.buffer, place_.group, MessageNote{src, dst, key, *site}});
  auto kept = std::make_shared<Message>(std::move(message));
  const std::span<const std::byte> payload = kept->bytes();
  wire_->Send(place_.process_of[dst], header, payload, [kept] {});
  return std::nullopt;
}

void BetweenProcesses::Receive(Op op, const Exchange& exchange, int32_t dst, Receiver receiver) {
  inboxes_->Receive(op, exchange, dst, std::move(receiver));
}

void BetweenProcesses::Fail(int64_t /*run*/, const Fault& fault) { End(fault, /*tell=*/true); }

void BetweenProcesses::End(const Fault& fault, bool tell) {
  {
    const std::lock_guard lock(mutex_);
    if (ended_) return;
    ended_ = fault;
    on_end_(fault);
    if (tell) Tell(fault);
  }
  inboxes_->Close(fault);
}

void BetweenProcesses::Tell(const Fault& fault) {
  const std::vector<std::byte> header = Encode({place_.buffer, place_.group, fault});
  const std::set<int32_t> processes(place_.process_of.begin(), place_.process_of.end());
  for (const int32_t process : processes) {
    if (process != place_.process) wire_->Send(process, header, {}, [] {});
  }
}

void BetweenProcesses::Close(const Fault& fault) {
  {
    const std::lock_guard lock(mutex_);
    if (!ended_) ended_ = fault;
  }
  inboxes_->Close(fault);
}

// ------------------------------------------------------------------------- from the wire's thread

BlockPool::Block BetweenProcesses::Allocate(const MessageNote& note, int64_t bytes) {
  if (!IsRank(note.dst) || !IsHere(note.dst) || bytes > MaxMessageBytes(config_)) return nullptr;
  return place_.pools[note.dst]->Take();
}

void BetweenProcesses::OnMessage(int32_t process, const MessageNote& note, BlockPool::Block block,
                                 int64_t bytes) {
  std::optional<Message> message = Message::FromBlock(std::move(block), bytes, config_);
  std::optional<Fault> fault;
  if (!IsRank(note.src) || place_.process_of[note.src] != process) {
    fault = MalformedMessage(
        -1, "one from rank " + std::to_string(note.src) + " by process " + std::to_string(process));
  } else if (!message) {
    fault = MalformedMessage(note.src, std::to_string(bytes) + " bytes that are none");
  } else {
    fault = Accept(note, std::move(*message));
  }
  if (!fault) return;
  fault->op = "receive";
  if (fault->rank < 0) fault->rank = note.dst;
  End(*fault, /*tell=*/true);
}

std::optional<Fault> BetweenProcesses::Accept(const MessageNote& note, Message message) {
  {
    const std::lock_guard lock(mutex_);
    if (ended_) return std::nullopt;
    auto site = std::make_shared<const CallSite>(note.site);
    if (auto fault = in_step_.Check(note.key, std::move(site), note.src)) return fault;
  }
  return inboxes_->Send(note.key, note.src, note.dst, std::move(message));
}

void BetweenProcesses::OnLost(int32_t process, const std::string& reason) {
  for (int32_t rank = 0; rank < config_.ep_size; ++rank) {
    if (place_.process_of[rank] == process) inboxes_->Lose(rank, reason);
  }
}

}  // namespace jax_sm_free
