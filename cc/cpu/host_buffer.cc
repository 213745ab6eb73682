#include "cc/cpu/host_buffer.h"

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>

#include "cc/cpu/in_process.h"

namespace jax_sm_free {

HostBuffer::HostBuffer(int64_t id, const Config& config,
                       const std::vector<std::optional<Place>>& places, RunNames names)
    : Buffer(id, config, places) {
  for (const std::optional<Place>& place : places) {
    if (!place) continue;
    if (groups_.size() <= static_cast<size_t>(place->group)) groups_.resize(place->group + 1);
    Group& group = groups_[place->group];
    group.resize(config.ep_size);
    group[place->rank] = std::make_unique<HostRank>(id, *place, config, names);
  }
}

HostBuffer::HostBuffer(int64_t id, const Config& config,
                       const std::vector<std::optional<Place>>& places)
    : HostBuffer(id, config, places, RunNames::kOfHost) {
  for (const Group& group : groups_) {
    auto transport = std::make_shared<InProcess>(
        config.ep_size, config.timeout_s,
        [this, &group](int64_t run, const Fault& fault) { OnFail(group, run, fault); });
    for (const std::unique_ptr<HostRank>& rank : group) rank->transport = transport;
  }
}

HostRank* HostBuffer::RankOf(int32_t device) const {
  const std::optional<Place> place = PlaceOf(device);
  return place ? groups_[place->group][place->rank].get() : nullptr;
}

void HostBuffer::OnFail(const Group& group, int64_t run, const Fault& fault) {
  RecordFault(fault);
  for (const std::unique_ptr<HostRank>& rank : group) rank->ledger.MarkFailed(run);
}

void HostBuffer::CloseTransports() {
  for (const Group& group : groups_) {
    // They share one transport.
    const auto first =
        std::ranges::find_if(group, [](const auto& rank) { return rank != nullptr; });
    if (first == group.end() || (*first)->transport == nullptr) continue;
    (*first)->transport->Close(
        {.op = "close",
         .rank = (*first)->rank,
         .expected = "buffer " + std::to_string(id()) + " to be open until its results are there",
         .seen = "it was closed",
         .exchange = {}});
  }
}

int64_t HostBuffer::MessageBytes(int32_t device) const {
  const HostRank* rank = RankOf(device);
  return rank == nullptr ? 0 : rank->pool.num_blocks() * MaxMessageBytes(config());
}

}  // namespace jax_sm_free
