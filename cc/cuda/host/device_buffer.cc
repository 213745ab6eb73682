#include "cc/cuda/host/device_buffer.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <utility>

#include "cc/cuda/host/device_scope.h"
#include "cc/cuda/host/refusal.h"
#include "cc/cuda/host/status_fault.h"
#include "cc/cuda/kernels/kernels.h"

namespace jax_sm_free::cuda {
namespace {

cudaError_t LoadKernels() {
  for (const auto load :
       {LoadRoute, LoadPack, LoadPackQuantized, LoadWait, LoadPlan, LoadUnpackExperts,
        LoadUnpackTokens, LoadUnpackDequantized, LoadPackSums, LoadSum, LoadSpread,
        LoadForwardRoute, LoadForwardRows, LoadForwardSums}) {
    if (const cudaError_t error = load(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

std::string Describe(const char* step, int32_t device, cudaError_t error) {
  return std::string(step) + " on device " + std::to_string(device) + ": " +
         cudaGetErrorString(error);
}

// Lets `device` reach the memory of `peer`. Returns what went wrong, or an empty text.
std::string EnablePeer(int32_t device, int32_t peer) {
  int can = 0;
  (void)cudaDeviceCanAccessPeer(&can, device, peer);
  if (can == 0) {
    return "device " + std::to_string(device) + " has no peer access to " + std::to_string(peer);
  }
  (void)cudaSetDevice(device);
  const cudaError_t error = cudaDeviceEnablePeerAccess(peer, 0);
  if (error == cudaErrorPeerAccessAlreadyEnabled) (void)cudaGetLastError();
  return error == cudaSuccess || error == cudaErrorPeerAccessAlreadyEnabled
             ? ""
             : Describe("peer access", device, error);
}

}  // namespace

void Freer::operator()(void* memory) const {
  (void)cudaSetDevice(device);
  (void)(host ? cudaFreeHost(memory) : cudaFree(memory));
}

std::optional<Fault> DeviceRank::SeenFault() const {
  if (std::optional<Fault> fault = mover->CopyFault()) return fault;
  return FaultIn(view.status->fault, view, view.config.timeout_s);
}

std::optional<std::string> DeviceBuffer::SeenFault() const {
  std::optional<std::string> echoed;
  for (const auto& rank : ranks_) {
    if (rank == nullptr) continue;
    std::optional<Fault> fault = rank->SeenFault();
    if (!fault) continue;
    if (!IsEcho(rank->view.status->fault)) {
      // Other processes hear of the fault before this call returns it.
      if (neighbours_) neighbours_->group_end->TellFault(fault->Describe());
      return fault->Describe();
    }
    if (!echoed) echoed = fault->Describe();
  }
  if (neighbours_) {
    if (std::optional<std::string> told = neighbours_->group_end->Fault()) return told;
  }
  return echoed;
}

void DeviceBuffer::Close() {
  Stop();
  if (neighbours_) neighbours_->group_end->TellClosed();
}

void DeviceBuffer::Stop() {
  for (const auto& rank : ranks_) {
    if (rank == nullptr) continue;
    std::atomic_ref(rank->view.status->stopped).store(1, std::memory_order_release);
  }
}

void* DeviceBuffer::Take(int32_t device, bool host, int64_t bytes, std::string& error) {
  if (!error.empty()) return nullptr;
  void* memory = nullptr;
  const int64_t size = std::max<int64_t>(bytes, 1);
  const cudaError_t status =
      host ? cudaHostAlloc(&memory, size, cudaHostAllocPortable) : cudaMalloc(&memory, size);
  if (status != cudaSuccess) {
    (void)cudaGetLastError();
    error = "taking " + std::to_string(bytes) + " bytes of " + (host ? "pinned" : "device") +
            " memory, " + Describe("", device, status);
    return nullptr;
  }
  memory_.emplace_back(memory, Freer{device, host});
  return memory;
}

std::string DeviceBuffer::Allocate(int32_t device, const Place& place, std::byte* region) {
  (void)cudaSetDevice(device);
  const Config& config = this->config();
  auto rank = std::make_unique<DeviceRank>();
  RankView& view = rank->view;
  view = ViewOf(config, place.rank);
  view.buffer_id = id();
  view.position = place.position;
  const int64_t num_local = config.num_local_experts();
  const int64_t num_runs = config.ep_size * num_local;
  const int64_t max_rows = std::max(config.recv_capacity, config.max_recv_tokens());
  Counters* counters = nullptr;  // the reader's copy
  std::string error;
  const auto take = [&](auto*& pointer, bool host, int64_t count) {
    using T = std::remove_reference_t<decltype(*pointer)>;
    pointer = static_cast<T*>(Take(device, host, count * int64_t{sizeof(T)}, error));
  };
  view.base[place.rank] = region;
  if (region == nullptr) take(view.base[place.rank], false, view.regions.total);
  take(view.state, false, 1);
  take(view.mailbox, true, kMailboxEntries);
  take(view.status, true, 1);
  take(rank->copies_done, true, config.ep_size);
  take(counters, true, 1);
  take(view.own_token, false, int64_t{config.num_slots} * config.max_tokens);
  take(view.row_of, false, config.max_recv_tokens());
  take(view.tile_counts, false, (MaxTiles(config) + 1) * NumKeys(config));
  take(view.common_before, false, config.max_tokens);
  take(view.group_row, false, num_runs);
  take(view.group_end, false, num_local);
  take(view.group_next, false, num_local);
  take(view.covered, false, max_rows);
  if (!error.empty()) return error;
  std::fill_n(view.mailbox, kMailboxEntries, MailboxEntry{});
  *view.status = Status{};
  std::fill_n(rank->copies_done, config.ep_size, 0);
  (void)cudaMemset(view.base[place.rank], 0, view.regions.recv);
  (void)cudaMemset(view.state, 0, sizeof(DeviceState));
  if (const cudaError_t status = LoadKernels(); status != cudaSuccess) {
    return Describe("loading kernels", device, status);
  }
  if (const cudaError_t status = cudaDeviceSynchronize(); status != cudaSuccess) {
    return Describe("preparing memory", device, status);
  }
  rank->counters = std::make_unique<CounterReader>(device, view, counters);
  ranks_[device] = std::move(rank);
  return "";
}

std::string DeviceBuffer::Connect(int32_t device, const std::vector<std::optional<Place>>& places) {
  RankView& view = ranks_[device]->view;
  if (neighbours_) {
    std::copy(neighbours_->regions.begin(), neighbours_->regions.end(), view.base);
    return "";
  }
  for (size_t peer = 0; peer < places.size(); ++peer) {
    const auto& place = places[peer];
    if (peer == static_cast<size_t>(device) || !place || place->group != places[device]->group) {
      continue;
    }
    std::string error = EnablePeer(device, static_cast<int32_t>(peer));
    if (!error.empty()) return error;
    view.base[place->rank] = ranks_[peer]->view.base[place->rank];
  }
  return "";
}

void DeviceBuffer::StartMovers(const std::vector<std::optional<Place>>& places) {
  std::map<int32_t, std::shared_ptr<Crossbar>> crossbars;  // by group
  for (size_t device = 0; device < places.size(); ++device) {
    if (!places[device]) continue;
    DeviceRank& rank = *ranks_[device];
    auto& crossbar = crossbars[places[device]->group];
    if (crossbar == nullptr) {
      crossbar = neighbours_ ? neighbours_->crossbar : std::make_shared<Crossbar>();
    }
    rank.mover = std::make_unique<Mover>(
        static_cast<int>(device), rank.view, crossbar, neighbours_ ? neighbours_->courier : nullptr,
        neighbours_ ? neighbours_->group_end : nullptr, rank.copies_done);
  }
}

Result<std::shared_ptr<DeviceBuffer>> DeviceBuffer::Make(
    int64_t id, const Config& config, const std::vector<std::optional<Place>>& places,
    const std::optional<Neighbours>& neighbours) {
  const DeviceScope scope;
  if (config.ep_size > kMaxRanks) {
    return Refuse("at most " + std::to_string(kMaxRanks) + " ranks with peer access",
                  std::to_string(config.ep_size));
  }
  if (NumKeys(config) > kTileEntries * 64) {
    return Refuse("at most " + std::to_string(kTileEntries * 64) + " experts and ranks",
                  std::to_string(NumKeys(config)));
  }
  std::shared_ptr<DeviceBuffer> buffer(new DeviceBuffer(id, config, places));
  buffer->ranks_.resize(places.size());
  buffer->neighbours_ = neighbours;
  for (size_t device = 0; device < places.size(); ++device) {
    if (!places[device]) continue;
    std::byte* region = neighbours ? neighbours->regions[places[device]->rank] : nullptr;
    const std::string error =
        buffer->Allocate(static_cast<int32_t>(device), *places[device], region);
    if (!error.empty()) return Refuse("memory for the buffer", error);
  }
  for (size_t device = 0; device < places.size(); ++device) {
    if (!places[device]) continue;
    const std::string error = buffer->Connect(static_cast<int32_t>(device), places);
    if (!error.empty()) return Refuse("peer access between the devices of a group", error);
  }
  buffer->StartMovers(places);
  return buffer;
}

DeviceRank* DeviceBuffer::RankOf(int32_t device) const {
  return PlaceOf(device) && !ranks_.empty() ? ranks_[device].get() : nullptr;
}

int64_t DeviceBuffer::MessageBytes(int32_t device) const {
  return PlaceOf(device) ? RegionsOf(config()).total : 0;
}

void DeviceBuffer::Free() {
  const DeviceScope scope;
  for (size_t device = 0; device < ranks_.size(); ++device) {
    if (ranks_[device] == nullptr) continue;
    // Enqueued work still uses the memory, and needs the movers until it has ended.
    (void)cudaSetDevice(static_cast<int>(device));
    (void)cudaDeviceSynchronize();
  }
  for (const auto& rank : ranks_) {
    if (rank == nullptr) continue;
    rank->mover.reset();
    rank->counters.reset();
  }
  // A buffer that was dropped, not closed, has not told the others yet.
  if (neighbours_) neighbours_->group_end->TellClosed();
  memory_.clear();
  ranks_.clear();
  neighbours_.reset();
}

}  // namespace jax_sm_free::cuda
