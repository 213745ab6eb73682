#include "cc/cpu/host_buffer.h"

#include <cstddef>
#include <string>
#include <utility>

#include "cc/cpu/inboxes.h"
#include "cc/fault_texts.h"

namespace jax_sm_free {

HostBuffer::HostBuffer(int64_t id, const Config& config,
                       const std::vector<std::optional<Place>>& places, RunNames names)
    : Buffer(id, config, places) {
  for (const std::optional<Place>& place : places) {
    if (!place) continue;
    auto rank = std::make_unique<HostRank>(id, *place, config, names);
    const auto member = static_cast<size_t>(rank->member);
    if (ranks_.size() <= member) ranks_.resize(member + 1);
    ranks_[member] = std::move(rank);
  }
}

HostBuffer::HostBuffer(int64_t id, const Config& config,
                       const std::vector<std::optional<Place>>& places)
    : HostBuffer(id, config, places, RunNames::kOfHost) {
  const std::vector<int32_t> num_here(ranks_.size() / config.ep_size, config.ep_size);
  SetTransport(std::make_shared<Inboxes>(
      config, num_here, [this](int64_t run, const Fault& fault) { OnFail(run, fault); }));
}

HostRank* HostBuffer::RankOf(int32_t device) const {
  const std::optional<Place> place = PlaceOf(device);
  return place ? ranks_[place->group * config().ep_size + place->rank].get() : nullptr;
}

void HostBuffer::SetTransport(const std::shared_ptr<Transport>& transport) {
  transport_ = transport;
  for (const std::unique_ptr<HostRank>& rank : ranks_) {
    if (rank != nullptr) rank->transport = transport;
  }
}

void HostBuffer::OnFail(int64_t run, const Fault& fault) {
  RecordFault(fault);
  // Many runs may fail for the same reason. It is written once.
  const std::string text = fault.Describe();
  if (std::exchange(told_, text) != text) TellFault(fault);
  for (const std::unique_ptr<HostRank>& rank : ranks_) rank->ledger.MarkFailed(run);
}

void HostBuffer::CloseTransport() {
  if (transport_ == nullptr) return;
  transport_->Close(
      {.op = "close",
       .expected = "buffer " + std::to_string(id()) + " to be open until its results are there",
       .seen = "it was closed",
       .exchange = {}});
}

int64_t HostBuffer::MessageBytes(int32_t device) const {
  const HostRank* rank = RankOf(device);
  return rank == nullptr ? 0 : rank->pool.num_blocks() * MaxMessageBytesOfTiers(config());
}

Result<RankStats> HostBuffer::Stats(int32_t device) {
  const HostRank& rank = *RankOf(device);
  RankStats stats = rank.counters.Read();
  stats.waited_ns = rank.transport->WaitedNanoseconds(rank.member);
  return stats;
}

}  // namespace jax_sm_free
