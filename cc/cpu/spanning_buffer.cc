#include "cc/cpu/spanning_buffer.h"

#include <cstdio>
#include <utility>
#include <variant>

#include "cc/cpu/wire_note.h"
#include "cc/fault_texts.h"

namespace jax_sm_free {

Result<std::shared_ptr<SpanningBuffer>> SpanningBuffer::Open(
    int64_t id, const Config& config, const std::vector<std::optional<Place>>& places,
    const Processes& processes, const OpenWire& open_wire) {
  std::shared_ptr<SpanningBuffer> buffer(new SpanningBuffer(id, config, places));
  // The wire calls nothing back before the peers know its address.
  Result<std::unique_ptr<Wire>> wire = open_wire(buffer->Callbacks());
  if (const Fault* fault = FaultOf(wire)) return *fault;
  buffer->wire_ = std::move(std::get<0>(wire));
  buffer->AddTransport(processes);
  return buffer;
}

void SpanningBuffer::AddTransport(const Processes& processes) {
  BetweenProcesses::Members members{
      .buffer = id(), .process = processes.self, .process_of = {}, .pools = {}};
  for (const std::vector<int32_t>& group : processes.of_rank) {
    members.process_of.insert(members.process_of.end(), group.begin(), group.end());
  }
  members.pools.resize(members.process_of.size());
  for (const std::unique_ptr<HostRank>& rank : ranks()) {
    if (rank != nullptr) members.pools[rank->member] = &rank->pool;
  }
  auto transport = BetweenProcesses::Make(std::move(members), config(), wire_.get(),
                                          [this](const Fault& fault) { OnEnd(fault); });
  SetTransport(transport);
  const std::lock_guard lock(mutex_);
  transport_ = std::move(transport);
}

void SpanningBuffer::OnEnd(const Fault& fault) {
  {
    const std::lock_guard lock(mutex_);
    if (!fault_) fault_ = fault.Describe();
  }
  for (const std::unique_ptr<HostRank>& rank : ranks()) {
    if (rank != nullptr) rank->ledger.MarkAllFailed();
  }
}

std::optional<std::string> SpanningBuffer::TakeFault() {
  const std::lock_guard lock(mutex_);
  return fault_;
}

void SpanningBuffer::Close() {
  CloseTransport();
  if (wire_ != nullptr) wire_->Close();
}

// --------------------------------------------------------- calls of the wire's thread

Wire::Callbacks SpanningBuffer::Callbacks() {
  return {.wants = {},
          .allocate = [this](int32_t /*process*/, Wire::Header header,
                             int64_t bytes) { return Allocate(header, bytes); },
          .on_message =
              [this](int32_t process, Wire::Header header, BlockPool::Block payload,
                     int64_t bytes) { OnMessage(process, header, std::move(payload), bytes); },
          .on_lost =
              [this](int32_t process, const std::string& reason) {
                if (const auto transport = FindTransport()) transport->OnLost(process, reason);
              }};
}

std::shared_ptr<BetweenProcesses> SpanningBuffer::FindTransport() const {
  const std::lock_guard lock(mutex_);
  return transport_;
}

// Null for bytes that are not a note of this buffer.
std::shared_ptr<BetweenProcesses> SpanningBuffer::TransportOf(
    const std::optional<WireNote>& note) const {
  return note && note->buffer == id() ? FindTransport() : nullptr;
}

BlockPool::Block SpanningBuffer::Allocate(Wire::Header header, int64_t bytes) const {
  const std::optional<WireNote> note = Decode(header);
  const std::shared_ptr<BetweenProcesses> transport = TransportOf(note);
  if (transport == nullptr) return nullptr;
  const auto* message = std::get_if<MessageNote>(&note->body);
  return message == nullptr ? nullptr : transport->Allocate(*message, bytes);
}

void SpanningBuffer::OnMessage(int32_t process, Wire::Header header, BlockPool::Block payload,
                               int64_t bytes) {
  const std::optional<WireNote> note = Decode(header);
  const std::shared_ptr<BetweenProcesses> transport = TransportOf(note);
  if (transport == nullptr) {
    (void)std::fprintf(stderr, "jax_sm_free: buffer %lld: process %d sent what is none of it\n",
                       static_cast<long long>(id()), process);
  } else if (const auto* message = std::get_if<MessageNote>(&note->body)) {
    transport->OnMessage(process, *message, std::move(payload), bytes);
  } else if (const auto* finished = std::get_if<FinishedNote>(&note->body)) {
    transport->OnFinished(process, *finished);
  } else {
    Fault fault = std::get<Fault>(note->body);
    NameNodes(config(), fault);
    transport->OnFault(fault);
  }
}

}  // namespace jax_sm_free
