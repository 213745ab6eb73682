#include "cc/cuda/processes/nvshmem_buffer.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <utility>
#include <variant>

#include "cc/cuda/host/courier.h"
#include "cc/cuda/host/device_scope.h"
#include "cc/cuda/host/refusal.h"
#include "cc/cuda/processes/host_memory.h"
#include "cc/cuda/processes/nvshmem.h"
#include "cc/cuda/processes/nvshmem_regions.h"
#include "cc/cuda/processes/symmetric_heap.h"
#include "cc/cuda/processes/visible_gpus.h"

namespace jax_sm_free::cuda {
namespace {

constexpr size_t kHeapStep = size_t{512} << 20;  // NVSHMEM_CUMEM_GRANULARITY

// Waits for what is under way on the device: NVSHMEM maps memory, and may wait for the device while
// it holds locks that the movers of other buffers need.
cudaError_t Prepare(int device) {
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFree(nullptr);  // makes the context, if XLA has not
  return error == cudaSuccess ? cudaDeviceSynchronize() : error;
}

SymmetricHeap& Heap() {
  static auto* heap = new SymmetricHeap;  // never destroyed: buffers may outlive static destructors
  return *heap;
}

// What a process tells the others of NVSHMEM. The ids of the blocks that it has dropped follow, an
// i64 each.
struct Membership {
  char make_id[128];  // from the first process, if NVSHMEM does not connect it yet
  int32_t pe;         // -1 if NVSHMEM does not connect the process yet
  int32_t num_pes;
};

class Opening {
 public:
  Opening(Rendezvous& rendezvous, Nvshmem* nvshmem) : rendezvous_(rendezvous), nvshmem_(nvshmem) {}

  // Each of these is collective.

  // Tells the others what NVSHMEM knows of this process, and hears the same of them.
  std::optional<Fault> Meet();
  // Lets NVSHMEM connect this process with all others.
  std::optional<Fault> Join();
  // Takes this rank's region, and finds those of the others.
  std::optional<Fault> FindRegions(const Config& config, Neighbours& neighbours);

 private:
  Result<std::string> OwnWords() const;
  std::optional<Fault> Hear(const std::string& words);
  // This process's part of a symmetric block.
  Result<std::shared_ptr<void>> TakeMemory(size_t bytes);
  std::byte* PointerAt(std::byte* own, int pe) const;
  int32_t index() const { return rendezvous_.processes().index; }

  Rendezvous& rendezvous_;
  Nvshmem* const nvshmem_;
  std::vector<Membership> memberships_;  // by process
  SymmetricHeap::Ids dropped_by_all_;
  std::vector<int32_t> pes_;  // by process
};

Result<std::string> Opening::OwnWords() const {
  Membership own{};
  own.pe = nvshmem_->IsJoined() ? nvshmem_->Pe() : -1;
  own.num_pes = own.pe < 0 ? 0 : nvshmem_->NumPes();
  if (index() == 0 && own.pe < 0) {
    const Result<std::string> made = nvshmem_->MakeId();
    if (const Fault* fault = FaultOf(made)) return *fault;
    const auto& id = std::get<std::string>(made);
    std::memcpy(own.make_id, id.data(), std::min(id.size(), sizeof(own.make_id)));
  }
  std::string words(reinterpret_cast<const char*>(&own), sizeof(own));
  for (const int64_t id : Heap().Dropped()) {
    words.append(reinterpret_cast<const char*>(&id), sizeof(id));
  }
  return words;
}

std::optional<Fault> Opening::Hear(const std::string& words) {
  if (words.size() < sizeof(Membership)) {
    return Refuse("words of NVSHMEM of at least " + std::to_string(sizeof(Membership)) + " bytes",
                  std::to_string(words.size()));
  }
  std::memcpy(&memberships_.emplace_back(), words.data(), sizeof(Membership));
  SymmetricHeap::Ids dropped;
  for (size_t at = sizeof(Membership); at + sizeof(int64_t) <= words.size();
       at += sizeof(int64_t)) {
    int64_t id = 0;
    std::memcpy(&id, words.data() + at, sizeof(id));
    if (memberships_.size() == 1 || dropped_by_all_.count(id) != 0) dropped.insert(id);
  }
  dropped_by_all_ = std::move(dropped);
  return std::nullopt;
}

std::optional<Fault> Opening::Meet() {
  const Result<std::string> own = OwnWords();
  if (const Fault* fault = FaultOf(own)) return *fault;
  const auto met = rendezvous_.Meet(std::get<std::string>(own));
  if (const Fault* fault = FaultOf(met)) return *fault;
  for (const std::string& words : std::get<std::vector<std::string>>(met)) {
    if (auto fault = Hear(words)) return fault;
  }
  return std::nullopt;
}

std::optional<Fault> Opening::Join() {
  const int32_t num_processes = rendezvous_.num_processes();
  const bool joined = memberships_[index()].pe >= 0;
  for (const Membership& other : memberships_) {
    const bool as_we = (other.pe >= 0) == joined;
    if (as_we && (!joined || other.num_pes == num_processes)) continue;
    return Refuse("NVSHMEM to connect just the " + std::to_string(num_processes) +
                      " processes of the mesh, as the first buffer did: later ones are over the "
                      "same processes",
                  std::to_string(other.num_pes) + " connected");
  }
  if (!joined) {
    const std::string id(memberships_[0].make_id, sizeof(Membership::make_id));
    if (auto fault = nvshmem_->Join(id, index(), num_processes)) return fault;
  }
  for (int32_t i = 0; i < num_processes; ++i) pes_.push_back(joined ? memberships_[i].pe : i);
  return std::nullopt;
}

Result<std::shared_ptr<void>> Opening::TakeMemory(size_t bytes) {
  size_t free_bytes = 0;
  size_t all_bytes = 0;
  (void)cudaMemGetInfo(&free_bytes, &all_bytes);
  const std::vector<std::string> free_mib =
      rendezvous_.processes().exchange(std::to_string(free_bytes >> 20));
  // All processes refuse if one has too little, because NVSHMEM would hang.
  const auto allocate = [&](size_t size, size_t growth) -> void* {
    const size_t needed_mib = (growth + kHeapStep - 1) / kHeapStep * (kHeapStep >> 20);
    for (const std::string& mib : free_mib) {
      if (std::stoull(mib) < needed_mib) return nullptr;
    }
    return nvshmem_->Allocate(size);
  };
  std::shared_ptr<void> memory = Heap().Take(
      bytes, dropped_by_all_, {allocate, [this](void* block) { nvshmem_->Free(block); }});
  if (memory != nullptr) return memory;
  std::string seen;
  for (const std::string& mib : free_mib) seen += (seen.empty() ? "" : ", ") + mib;
  return Refuse(std::to_string(bytes >> 20) + " MiB for messages on each GPU, in steps of " +
                    std::to_string(kHeapStep >> 20) + " MiB",
                seen +
                    " MiB free, by process; XLA_PYTHON_CLIENT_MEM_FRACTION says how much XLA "
                    "takes");
}

std::optional<Fault> Opening::FindRegions(const Config& config, Neighbours& neighbours) {
  auto taken = TakeMemory(static_cast<size_t>(RegionsOf(config).total));
  if (const Fault* fault = FaultOf(taken)) return *fault;
  neighbours.memory = std::get<std::shared_ptr<void>>(std::move(taken));
  auto* own = static_cast<std::byte*>(neighbours.memory.get());
  std::vector<int32_t> out_of_reach;  // PE, or -1
  WarnOfHiddenGpus(rendezvous_);
  for (const int32_t process : rendezvous_.processes().of_rank) {
    std::byte* region = process == index() ? own : PointerAt(own, pes_[process]);
    neighbours.regions.push_back(region);
    out_of_reach.push_back(region == nullptr ? pes_[process] : -1);
  }
  if (std::count(out_of_reach.begin(), out_of_reach.end(), -1) == std::ssize(out_of_reach)) {
    return std::nullopt;
  }
  auto made = Courier::Make(std::make_unique<NvshmemRegions>(nvshmem_, own, out_of_reach), config);
  if (const Fault* fault = FaultOf(made)) return *fault;
  neighbours.courier = std::get<std::shared_ptr<Courier>>(std::move(made));
  for (size_t rank = 0; rank < out_of_reach.size(); ++rank) {
    if (out_of_reach[rank] < 0) continue;
    neighbours.regions[rank] = neighbours.courier->OutboxOf(static_cast<int32_t>(rank));
  }
  return std::nullopt;
}

std::byte* Opening::PointerAt(std::byte* own, int pe) const {
  static const bool puts_alone = std::getenv("JAX_SM_FREE_NVSHMEM_PUTS") != nullptr;
  return puts_alone ? nullptr : nvshmem_->PointerAt(own, pe);
}

}  // namespace

Result<std::shared_ptr<DeviceBuffer>> OpenNvshmemBuffer(
    int64_t id, const Config& config, const std::vector<std::optional<Place>>& places,
    const std::string& library, const Processes& processes) {
  const auto place = std::find_if(places.begin(), places.end(),
                                  [](const auto& candidate) { return candidate.has_value(); });
  const DeviceScope scope;
  const auto device = static_cast<int>(std::distance(places.begin(), place));
  if (const cudaError_t error = Prepare(device); error != cudaSuccess) {
    return Refuse("device " + std::to_string(device) + " to be usable", cudaGetErrorString(error));
  }
  const Result<Nvshmem*> nvshmem = Nvshmem::Load(library);
  if (const Fault* fault = FaultOf(nvshmem)) return *fault;
  const std::optional<GpuId> gpu = GpuIdOf(device);
  if (!gpu) return Refuse("device " + std::to_string(device) + " to have a name", "none");
  Rendezvous rendezvous(processes, *gpu);
  Opening opening(rendezvous, std::get<Nvshmem*>(nvshmem));
  Neighbours neighbours;
  if (auto fault = opening.Meet()) return *fault;
  if (auto fault = opening.Join()) return *fault;
  if (auto fault = opening.FindRegions(config, neighbours)) return *fault;
  const Result<HostMemory> shared = HostMemory::Share(rendezvous);
  if (const Fault* fault = FaultOf(shared)) return *fault;
  const auto& host_memory = std::get<HostMemory>(shared);
  neighbours.crossbar = host_memory.crossbar();
  neighbours.group_end = host_memory.group_end();
  auto buffer = DeviceBuffer::Make(id, config, places, neighbours);
  if (FaultOf(buffer) != nullptr) return buffer;
  // Nobody sends before all are ready to receive.
  processes.exchange("");
  host_memory.ForgetNames();
  return buffer;
}

}  // namespace jax_sm_free::cuda
