#include "cc/cpu/between_processes.h"

#include <algorithm>
#include <limits>
#include <set>
#include <utility>

#include "cc/cpu/worker_pool.h"
#include "cc/fault_texts.h"

namespace jax_sm_free {
std::shared_ptr<BetweenProcesses> BetweenProcesses::Make(Place place, const Config& config,
                                                         Wire* wire, OnEnd on_end) {
  std::shared_ptr<BetweenProcesses> made(
      new BetweenProcesses(std::move(place), config, wire, std::move(on_end)));
  const auto num_here =
      static_cast<int32_t>(std::ranges::count(made->place_.process_of, made->place_.process));
  // The inboxes call this while they are locked.
  const auto on_fail = [weak = made->weak_from_this()](int64_t /*run*/, const Fault& fault) {
    WorkerPool::Get().Run([weak, fault] {
      if (const auto self = weak.lock()) self->End(fault);
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
      in_step_(place_.process_of, place_.process),
      latest_run_(config.ep_size) {}

std::optional<Fault> BetweenProcesses::Begin(Op op, const Exchange& exchange, int32_t rank,
                                             std::shared_ptr<const CallSite> site) {
  std::optional<Fault> fault;
  {
    const std::lock_guard lock(mutex_);
    if (ended_) return ended_;
    fault = site == nullptr
                ? NamelessCall()
                : in_step_.Check(exchange.key, {std::move(site), rank, exchange.host_run});
  }
  if (!fault) return std::nullopt;
  fault->op = OpName(op);
  if (fault->rank < 0) fault->rank = rank;
  fault->exchange = exchange.Describe();
  End(*fault);
  return fault;
}

std::optional<Fault> BetweenProcesses::Send(const ExchangeKey& key, int32_t src, int32_t dst,
                                            Message message) {
  if (IsHere(dst)) return inboxes_->Send(key, src, dst, std::move(message));
  MessageNote note{.src = src, .dst = dst, .key = key, .site = {}};
  {
    const std::lock_guard lock(mutex_);
    if (ended_) return ended_;
    const Statement& said = *in_step_.SaidHere(key);
    note.site = *said.site;
    note.start = said.start;
  }
  const std::vector<std::byte> header = Encode({place_.buffer, place_.group, std::move(note)});
  auto kept = std::make_shared<Message>(std::move(message));
  const std::span<const std::byte> payload = kept->bytes();
  wire_->Send(place_.process_of[dst], header, payload, [kept] {});
  return std::nullopt;
}

void BetweenProcesses::Receive(Op op, const Exchange& exchange, int32_t dst, Receiver receiver) {
  inboxes_->Receive(op, exchange, dst, std::move(receiver));
}

void BetweenProcesses::Fail(int64_t /*run*/, const Fault& fault) { End(fault); }

void BetweenProcesses::End(const Fault& fault) {
  {
    const std::lock_guard lock(mutex_);
    if (ended_) return;
    ended_ = fault;
    on_end_(fault);
    Tell(fault);
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
  End(*fault);
}

std::optional<Fault> BetweenProcesses::Accept(const MessageNote& note, Message message) {
  bool is_next = false;
  {
    const std::lock_guard lock(mutex_);
    if (ended_) return std::nullopt;
    auto site = std::make_shared<const CallSite>(note.site);
    if (auto fault = in_step_.Check(note.key, {std::move(site), note.src, note.start})) {
      return fault;
    }
    is_next = note.key.run >
              std::exchange(latest_run_[note.src], std::max(latest_run_[note.src], note.key.run));
  }
  // A rank runs one program after the other, and what it sends arrives in that order.
  if (is_next) {
    inboxes_->Lose(note.src, "it has begun run " + std::to_string(note.key.run), note.key.run);
  }
  return inboxes_->Send(note.key, note.src, note.dst, std::move(message));
}

void BetweenProcesses::OnLost(int32_t process, const std::string& reason) {
  for (int32_t rank = 0; rank < config_.ep_size; ++rank) {
    if (place_.process_of[rank] != process) continue;
    inboxes_->Lose(rank, "its process is gone: " + reason, std::numeric_limits<int64_t>::max());
  }
}

}  // namespace jax_sm_free
