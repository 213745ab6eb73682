#include "cc/cpu/spanning_buffer.h"

#include <cstddef>
#include <cstdio>
#include <utility>
#include <variant>

#include "cc/cpu/wire_note.h"

namespace jax_sm_free {

Result<std::shared_ptr<SpanningBuffer>> SpanningBuffer::Open(
    int64_t id, const Config& config, const std::vector<std::optional<Place>>& places,
    const Processes& processes, const OpenWire& open_wire) {
  std::shared_ptr<SpanningBuffer> buffer(new SpanningBuffer(id, config, places));
  // The wire has nothing to call back for until peers know its address.
  Result<std::unique_ptr<Wire>> wire = open_wire(buffer->Callbacks());
  if (const Fault* fault = FaultOf(wire)) return *fault;
  buffer->wire_ = std::move(std::get<0>(wire));
  buffer->AddTransports(processes);
  return buffer;
}

void SpanningBuffer::AddTransports(const Processes& processes) {
  std::vector<std::shared_ptr<BetweenProcesses>> transports(groups().size());
  for (size_t group = 0; group < groups().size(); ++group) {
    const Group& ranks = groups()[group];
    if (ranks.empty()) continue;
    BetweenProcesses::Place place{.buffer = id(),
                                  .group = static_cast<int32_t>(group),
                                  .process = processes.self,
                                  .process_of = processes.of_rank[group],
                                  .pools = {}};
    for (const std::unique_ptr<HostRank>& rank : ranks) {
      place.pools.push_back(rank == nullptr ? nullptr : &rank->pool);
    }
    transports[group] =
        BetweenProcesses::Make(std::move(place), config(), wire_.get(),
                               [this, &ranks](const Fault& fault) { OnEnd(ranks, fault); });
    for (const std::unique_ptr<HostRank>& rank : ranks) {
      if (rank != nullptr) rank->transport = transports[group];
    }
  }
  const std::lock_guard lock(mutex_);
  transports_ = std::move(transports);
}

void SpanningBuffer::OnEnd(const Group& group, const Fault& fault) {
  {
    const std::lock_guard lock(mutex_);
    if (!fault_) fault_ = fault.Describe();
  }
  for (const std::unique_ptr<HostRank>& rank : group) {
    if (rank != nullptr) rank->ledger.MarkAllFailed();
  }
}

std::optional<std::string> SpanningBuffer::TakeFault() {
  const std::lock_guard lock(mutex_);
  return fault_;
}

void SpanningBuffer::Close() {
  CloseTransports();
  if (wire_ != nullptr) wire_->Close();
}

// ------------------------------------------------------------------------- from the wire's thread

Wire::Callbacks SpanningBuffer::Callbacks() {
  return {.wants = {},
          .allocate = [this](int32_t /*process*/, Wire::Header header,
                             int64_t bytes) { return Allocate(header, bytes); },
          .on_message =
              [this](int32_t process, Wire::Header header, BlockPool::Block payload,
                     int64_t bytes) { OnMessage(process, header, std::move(payload), bytes); },
          .on_lost =
              [this](int32_t process, const std::string& reason) {
                for (const auto& transport : Transports()) {
                  if (transport != nullptr) transport->OnLost(process, reason);
                }
              }};
}

std::vector<std::shared_ptr<BetweenProcesses>> SpanningBuffer::Transports() const {
  const std::lock_guard lock(mutex_);
  return transports_;
}

std::shared_ptr<BetweenProcesses> SpanningBuffer::TransportOf(const WireNote& note) const {
  if (note.buffer != id() || note.group < 0) return nullptr;
  const auto group = static_cast<size_t>(note.group);
  const std::lock_guard lock(mutex_);
  return group < transports_.size() ? transports_[group] : nullptr;
}

BlockPool::Block SpanningBuffer::Allocate(Wire::Header header, int64_t bytes) const {
  const std::optional<WireNote> note = Decode(header);
  if (!note) return nullptr;
  const auto* message = std::get_if<MessageNote>(&note->body);
  const std::shared_ptr<BetweenProcesses> transport = TransportOf(*note);
  if (message == nullptr || transport == nullptr) return nullptr;
  return transport->Allocate(*message, bytes);
}

void SpanningBuffer::OnMessage(int32_t process, Wire::Header header, BlockPool::Block payload,
                               int64_t bytes) {
  const std::optional<WireNote> note = Decode(header);
  const std::shared_ptr<BetweenProcesses> transport = note ? TransportOf(*note) : nullptr;
  if (transport == nullptr) {
    (void)std::fprintf(stderr, "jax_sm_free: buffer %lld: process %d sent what is none of it\n",
                       static_cast<long long>(id()), process);
  } else if (const auto* message = std::get_if<MessageNote>(&note->body)) {
    transport->OnMessage(process, *message, std::move(payload), bytes);
  } else {
    transport->OnFault(std::get<Fault>(note->body));
  }
}

}  // namespace jax_sm_free
