#include "cc/cpu/between_processes.h"

#include <algorithm>
#include <utility>

#include "cc/cpu/worker_pool.h"
#include "cc/fault_texts.h"

namespace jax_sm_free {
namespace {

// By group: how many of its ranks are in `process`.
std::vector<int32_t> NumHere(const std::vector<int32_t>& process_of, int32_t process,
                             int32_t ep_size) {
  std::vector<int32_t> num_here(process_of.size() / ep_size);
  for (size_t member = 0; member < process_of.size(); ++member) {
    if (process_of[member] == process) ++num_here[member / ep_size];
  }
  return num_here;
}

std::set<int32_t> Others(const std::vector<int32_t>& process_of, int32_t process) {
  std::set<int32_t> others(process_of.begin(), process_of.end());
  others.erase(process);
  return others;
}

// One for each group.
std::vector<InStep> InSteps(const std::vector<int32_t>& process_of, int32_t process,
                            int32_t ep_size) {
  std::vector<InStep> in_steps;
  for (auto group = process_of.begin(); group != process_of.end(); group += ep_size) {
    in_steps.emplace_back(std::vector<int32_t>(group, group + ep_size), process);
  }
  return in_steps;
}

}  // namespace

std::shared_ptr<BetweenProcesses> BetweenProcesses::Make(Members members, const Config& config,
                                                         Wire* wire, OnEnd on_end) {
  std::shared_ptr<BetweenProcesses> made(
      new BetweenProcesses(std::move(members), config, wire, std::move(on_end)));
  // The inboxes call this while they are locked, and before their receivers get the fault. So the
  // other processes hear of the fault before anything that the program of this process does then,
  // such as closing the buffer.
  const auto on_fail = [weak = made->weak_from_this()](int64_t /*run*/, const Fault& fault) {
    const auto self = weak.lock();
    if (self == nullptr || !self->TellEnd(fault, Seen::kHere)) return;
    WorkerPool::Get().Run([self, fault] { self->inboxes_->Close(fault); });
  };
  made->inboxes_ = std::make_shared<Inboxes>(config, made->num_here_, on_fail);
  return made;
}

BetweenProcesses::BetweenProcesses(Members members, const Config& config, Wire* wire, OnEnd on_end)
    : members_(std::move(members)),
      config_(config),
      wire_(wire),
      on_end_(std::move(on_end)),
      num_here_(NumHere(members_.process_of, members_.process, config.ep_size)),
      others_(Others(members_.process_of, members_.process)),
      in_step_(InSteps(members_.process_of, members_.process, config.ep_size)),
      latest_run_(members_.process_of.size()),
      num_finished_(num_here_.size()) {}

std::optional<Fault> BetweenProcesses::Begin(Op op, const Exchange& exchange, int32_t member,
                                             std::shared_ptr<const CallSite> site) {
  const int32_t rank = RankOf(member);
  std::optional<Fault> fault;
  {
    const std::lock_guard lock(mutex_);
    if (ended_) return ended_;
    InStep& in_step = in_step_[GroupOf(member)];
    fault = site == nullptr
                ? NamelessCall()
                : in_step.Check(exchange.key, {std::move(site), rank, exchange.host_run});
  }
  if (!fault) return std::nullopt;
  fault->op = OpName(op);
  if (fault->rank < 0) fault->rank = rank;
  fault->exchange = exchange.Describe();
  NameNodes(config_, *fault);
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
    const Statement& said = *in_step_[GroupOf(src)].SaidHere(key);
    note.site = *said.site;
    note.start = said.start;
  }
  const std::vector<std::byte> header = Encode({members_.buffer, std::move(note)});
  auto kept = std::make_shared<Message>(std::move(message));
  const std::span<const std::byte> payload = kept->bytes();
  wire_->Send(members_.process_of[dst], header, payload, [kept] {});
  return std::nullopt;
}

// Other processes hear of the first rank, which says that the group takes part, and of the last
// rank.
void BetweenProcesses::Finish(const ExchangeKey& key, int32_t member) {
  if (num_here_.size() == 1) return;  // the messages themselves say this
  const int32_t group = GroupOf(member);
  inboxes_->Finish(key, member);
  const std::lock_guard lock(mutex_);
  const int32_t num_finished = ++num_finished_[group][key];
  const bool is_last = num_finished == num_here_[group];
  if (is_last) num_finished_[group].erase(key);
  if (num_finished > 1 && !is_last) return;
  const int32_t num_new = num_finished == 1 ? 1 : num_finished - 1;
  Tell({members_.buffer, FinishedNote{.group = group, .num_ranks = num_new, .key = key}});
}

std::optional<Fault> BetweenProcesses::SendAll(const ExchangeKey& key, int32_t member,
                                               std::span<const Parcel> parcels, const Pack& pack,
                                               bool finishes) {
  const int32_t first = member - RankOf(member);
  for (const Parcel& parcel : parcels) {
    auto fault = Send(key, first + parcel.number, first + parcel.dst, pack(parcel));
    if (fault) return fault;
  }
  if (finishes) Finish(key, member);
  return std::nullopt;
}

void BetweenProcesses::Receive(Op op, const Exchange& exchange, int32_t dst, Receiver receiver) {
  inboxes_->Receive(op, exchange, dst, std::move(receiver));
}

void BetweenProcesses::Fail(int64_t /*run*/, const Fault& fault) { End(fault); }

void BetweenProcesses::End(const Fault& fault, Seen seen) {
  if (TellEnd(fault, seen)) inboxes_->Close(fault);
}

bool BetweenProcesses::TellEnd(const Fault& fault, Seen seen) {
  const std::lock_guard lock(mutex_);
  if (ended_) return false;
  ended_ = fault;
  on_end_(fault);
  if (seen == Seen::kHere) TellFault(fault);
  Tell({members_.buffer, fault});
  return true;
}

void BetweenProcesses::Tell(const WireNote& note) {
  const std::vector<std::byte> header = Encode(note);
  for (const int32_t process : others_) wire_->Send(process, header, {}, [] {});
}

void BetweenProcesses::Close(const Fault& fault) {
  {
    const std::lock_guard lock(mutex_);
    if (!ended_) ended_ = fault;
  }
  inboxes_->Close(fault);
}

// --------------------------------------------------------- calls of the wire's thread

BlockPool::Block BetweenProcesses::Allocate(const MessageNote& note, int64_t bytes) {
  if (!IsMember(note.dst) || !IsHere(note.dst)) return nullptr;
  if (bytes > MaxMessageBytesOfTiers(config_)) return nullptr;
  return members_.pools[note.dst]->Take();
}

void BetweenProcesses::OnMessage(int32_t process, const MessageNote& note, BlockPool::Block block,
                                 int64_t bytes) {
  std::optional<Message> message =
      Message::FromBlock(std::move(block), bytes, ConfigOf(config_, note.key.hop));
  std::optional<Fault> fault;
  if (!IsMember(note.src) || GroupOf(note.src) != GroupOf(note.dst) ||
      !Comes(config_, note.key.hop, RankOf(note.src), RankOf(note.dst)) ||
      members_.process_of[CarrierOf(note)] != process) {
    fault = MalformedMessage(-1, "one from member " + std::to_string(note.src) + " to member " +
                                     std::to_string(note.dst) + " by process " +
                                     std::to_string(process));
  } else if (!message) {
    fault = MalformedMessage(RankOf(note.src), std::to_string(bytes) + " bytes that are none");
  } else {
    fault = Accept(note, std::move(*message));
  }
  if (!fault) return;
  fault->op = "receive";
  if (fault->rank < 0) fault->rank = RankOf(note.dst);
  NameNodes(config_, *fault);
  End(*fault);
}

int32_t BetweenProcesses::CarrierOf(const MessageNote& note) const {
  const int32_t carrier =
      jax_sm_free::CarrierOf(config_, note.key.hop, RankOf(note.src), RankOf(note.dst));
  return note.dst - RankOf(note.dst) + carrier;
}

std::optional<Fault> BetweenProcesses::Accept(const MessageNote& note, Message message) {
  bool is_next = false;
  const int32_t carrier = CarrierOf(note);
  {
    const std::lock_guard lock(mutex_);
    if (ended_) return std::nullopt;
    auto site = std::make_shared<const CallSite>(note.site);
    InStep& in_step = in_step_[GroupOf(carrier)];
    if (auto fault = in_step.Check(note.key, {std::move(site), RankOf(carrier), note.start})) {
      return fault;
    }
    int64_t& latest = latest_run_[carrier];
    is_next = note.key.run > std::exchange(latest, std::max(latest, note.key.run));
  }
  // A rank runs one program after the other, and its messages arrive in that order.
  if (is_next) {
    inboxes_->Lose(carrier, "it has begun run " + std::to_string(note.key.run), note.key.run);
  }
  return inboxes_->Send(note.key, note.src, note.dst, std::move(message));
}

void BetweenProcesses::OnFinished(int32_t process, const FinishedNote& note) {
  const auto num_groups = static_cast<int32_t>(num_here_.size());
  if (note.group >= 0 && note.group < num_groups) {
    inboxes_->AddFinished(note.key, note.group, note.num_ranks);
    return;
  }
  Fault fault = MalformedMessage(
      -1, "news of group " + std::to_string(note.group) + " by process " + std::to_string(process));
  fault.op = "receive";
  End(fault);
}

void BetweenProcesses::OnLost(int32_t process, const std::string& reason) {
  for (int32_t member = 0; IsMember(member); ++member) {
    if (members_.process_of[member] != process) continue;
    inboxes_->Lose(member, "its process is gone: " + reason, Inboxes::kForEver);
  }
}

}  // namespace jax_sm_free
