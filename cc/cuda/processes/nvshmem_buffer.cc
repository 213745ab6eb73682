#include "cc/cuda/processes/nvshmem_buffer.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <numeric>
#include <random>
#include <utility>

#include "cc/cuda/host/courier.h"
#include "cc/cuda/host/crossbar.h"
#include "cc/cuda/host/device_scope.h"
#include "cc/cuda/host/group_end.h"
#include "cc/cuda/host/refusal.h"
#include "cc/cuda/processes/gpu_id.h"
#include "cc/cuda/processes/nvshmem.h"
#include "cc/cuda/processes/nvshmem_regions.h"
#include "cc/cuda/processes/shared_memory.h"
#include "cc/cuda/processes/symmetric_heap.h"

namespace jax_sm_free::cuda {
namespace {

constexpr size_t kHeapStep = size_t{512} << 20;  // NVSHMEM_CUMEM_GRANULARITY

// For tests with more processes than GPUs, since a GPU gives them its time in turn.
bool MayShareGpus() { return std::getenv("JAX_SM_FREE_SHARED_GPUS") != nullptr; }

// What a process tells the others first; its dropped blocks follow, i64 each.
struct Hello {
  char host[64];    // MemoryHost, 0-terminated
  char memory[32];  // a name that nobody else has
  GpuId gpu;
  char make_id[128];  // of NVSHMEM, from the first process if it has not joined
  int32_t pe;         // -1: not joined
  int32_t num_pes;
};

// Waits for what is under way: NVSHMEM maps memory, and may wait for the device with locks that
// the movers of other buffers need.
cudaError_t Prepare(int device) {
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFree(nullptr);  // makes the context, if XLA has not
  return error == cudaSuccess ? cudaDeviceSynchronize() : error;
}

std::string RandomName() {
  std::random_device random;
  char name[sizeof(Hello::memory)];
  std::snprintf(name, sizeof(name), "/jax_sm_free.%08x%08x", random(), random());
  return name;
}

void Put(const std::string& text, char* to, size_t size) {
  std::memcpy(to, text.data(), std::min(text.size(), size));
}

class Opening {
 public:
  Opening(const Processes& processes, int device, Nvshmem* nvshmem)
      : processes_(processes), device_(device), nvshmem_(nvshmem) {}

  // Tells the others of this process, and hears of them.
  std::optional<Fault> Meet();
  // Makes this process one of NVSHMEM's, with all others.
  std::optional<Fault> Join();
  // Takes this rank's region, and finds those of the others.
  std::optional<Fault> FindRegions(const Config& config);
  // Shares the group's crossbar, and what is to be told of the end of the group and of all groups,
  // with the processes of this host.
  std::optional<Fault> ShareMemory();

  const Neighbours& neighbours() const { return neighbours_; }
  // After all have called ShareMemory.
  void ForgetNames() {
    for (const auto& memory : {group_memory_, mesh_memory_}) memory->Unname();
  }

 private:
  Result<Hello> OwnHello() const;
  // Refuses in all processes if one has too little: NVSHMEM would hang.
  std::optional<Fault> TakeMemory(size_t bytes);
  // Where CUDA would not use copy engines.
  void WarnOfHidden() const;
  bool OnThisHost(const Hello& hello) const;
  // Null for memory out of reach.
  std::byte* PointerAt(std::byte* own, int pe) const;
  // Of these processes the first on this host.
  int32_t HostLeader(const std::vector<int32_t>& processes) const;
  int32_t NumProcesses() const { return static_cast<int32_t>(hellos_.size()); }

  const Processes& processes_;
  const int device_;
  Nvshmem* const nvshmem_;
  std::vector<Hello> hellos_;  // by process
  SymmetricHeap::Ids dropped_by_all_;
  std::vector<int32_t> pes_;  // by process
  std::shared_ptr<SharedMemory> group_memory_;
  std::shared_ptr<SharedMemory> mesh_memory_;
  Neighbours neighbours_;
};

SymmetricHeap& Heap() {
  static auto* heap = new SymmetricHeap;  // never destroyed: buffers may outlive static destructors
  return *heap;
}

Result<Hello> Opening::OwnHello() const {
  Hello hello{};
  Put(MemoryHost(), hello.host, sizeof(hello.host) - 1);
  Put(RandomName(), hello.memory, sizeof(hello.memory) - 1);
  const std::optional<GpuId> gpu = GpuIdOf(device_);
  if (!gpu) return Refuse("device " + std::to_string(device_) + " to have a name", "none");
  hello.gpu = *gpu;
  hello.pe = nvshmem_->IsJoined() ? nvshmem_->Pe() : -1;
  hello.num_pes = hello.pe < 0 ? 0 : nvshmem_->NumPes();
  if (processes_.index == 0 && hello.pe < 0) {
    const Result<std::string> id = nvshmem_->MakeId();
    if (const Fault* fault = FaultOf(id)) return *fault;
    Put(std::get<std::string>(id), hello.make_id, sizeof(hello.make_id));
  }
  return hello;
}

std::optional<Fault> Opening::Meet() {
  const Result<Hello> own = OwnHello();
  if (const Fault* fault = FaultOf(own)) return *fault;
  std::string text(reinterpret_cast<const char*>(&std::get<Hello>(own)), sizeof(Hello));
  for (const int64_t id : Heap().Dropped()) {
    text.append(reinterpret_cast<const char*>(&id), sizeof(id));
  }
  for (const std::string& heard : processes_.exchange(text)) {
    if (heard.size() < sizeof(Hello)) {
      return Refuse("a greeting of at least " + std::to_string(sizeof(Hello)) + " bytes",
                    std::to_string(heard.size()));
    }
    std::memcpy(&hellos_.emplace_back(), heard.data(), sizeof(Hello));
    SymmetricHeap::Ids dropped;
    for (size_t at = sizeof(Hello); at + sizeof(int64_t) <= heard.size(); at += sizeof(int64_t)) {
      int64_t id = 0;
      std::memcpy(&id, heard.data() + at, sizeof(id));
      if (hellos_.size() == 1 || dropped_by_all_.count(id) != 0) dropped.insert(id);
    }
    dropped_by_all_ = std::move(dropped);
  }
  for (int32_t i = 0; i < NumProcesses(); ++i) {
    for (int32_t j = 0; j < i; ++j) {
      if (hellos_[i].gpu != hellos_[j].gpu || MayShareGpus()) continue;
      return Refuse("a GPU for each process",
                    "processes " + std::to_string(j) + " and " + std::to_string(i) +
                        " of the mesh with the same one (CUDA_VISIBLE_DEVICES, or "
                        "local_device_ids of jax.distributed.initialize, tell them apart; with "
                        "JAX_SM_FREE_SHARED_GPUS=1 they may share it, slowly)");
    }
  }
  return std::nullopt;
}

std::optional<Fault> Opening::Join() {
  const bool joined = hellos_[processes_.index].pe >= 0;
  for (const Hello& hello : hellos_) {
    const bool as_we = (hello.pe >= 0) == joined;
    if (as_we && (!joined || hello.num_pes == NumProcesses())) continue;
    return Refuse("NVSHMEM to connect just the " + std::to_string(NumProcesses()) +
                      " processes of the mesh, as the first buffer did: later ones are over the "
                      "same processes",
                  std::to_string(hello.num_pes) + " connected");
  }
  if (!joined) {
    const std::string id(hellos_[0].make_id, sizeof(Hello::make_id));
    if (auto fault = nvshmem_->Join(id, processes_.index, NumProcesses())) return fault;
  }
  for (int32_t i = 0; i < NumProcesses(); ++i) pes_.push_back(joined ? hellos_[i].pe : i);
  return std::nullopt;
}

std::optional<Fault> Opening::TakeMemory(size_t bytes) {
  size_t free_bytes = 0;
  size_t all_bytes = 0;
  (void)cudaMemGetInfo(&free_bytes, &all_bytes);
  const std::vector<std::string> free_mib = processes_.exchange(std::to_string(free_bytes >> 20));
  const auto allocate = [&](size_t size, size_t growth) -> void* {
    const size_t needed_mib = (growth + kHeapStep - 1) / kHeapStep * (kHeapStep >> 20);
    for (const std::string& mib : free_mib) {
      if (std::stoull(mib) < needed_mib) return nullptr;
    }
    return nvshmem_->Allocate(size);
  };
  neighbours_.memory = Heap().Take(bytes, dropped_by_all_,
                                   {allocate, [this](void* memory) { nvshmem_->Free(memory); }});
  if (neighbours_.memory != nullptr) return std::nullopt;
  std::string seen;
  for (const std::string& mib : free_mib) seen += (seen.empty() ? "" : ", ") + mib;
  return Refuse(std::to_string(bytes >> 20) + " MiB for messages on each GPU, in steps of " +
                    std::to_string(kHeapStep >> 20) + " MiB",
                seen +
                    " MiB free, by process; XLA_PYTHON_CLIENT_MEM_FRACTION says how much XLA "
                    "takes");
}

std::optional<Fault> Opening::FindRegions(const Config& config) {
  if (auto fault = TakeMemory(static_cast<size_t>(RegionsOf(config).total))) return fault;
  auto* own = static_cast<std::byte*>(neighbours_.memory.get());
  std::vector<int32_t> out_of_reach;  // PE, or -1
  WarnOfHidden();
  for (const int32_t process : processes_.of_rank) {
    std::byte* region = process == processes_.index ? own : PointerAt(own, pes_[process]);
    neighbours_.regions.push_back(region);
    out_of_reach.push_back(region == nullptr ? pes_[process] : -1);
  }
  if (std::count(out_of_reach.begin(), out_of_reach.end(), -1) == std::ssize(out_of_reach)) {
    return std::nullopt;
  }
  auto made = Courier::Make(std::make_unique<NvshmemRegions>(nvshmem_, own, out_of_reach), config);
  if (const Fault* fault = FaultOf(made)) return *fault;
  neighbours_.courier = std::get<std::shared_ptr<Courier>>(std::move(made));
  for (size_t rank = 0; rank < out_of_reach.size(); ++rank) {
    if (out_of_reach[rank] < 0) continue;
    neighbours_.regions[rank] = neighbours_.courier->OutboxOf(static_cast<int32_t>(rank));
  }
  return std::nullopt;
}

void Opening::WarnOfHidden() const {
  std::string hidden;
  for (const int32_t process : processes_.of_rank) {
    const Hello& hello = hellos_[process];
    if (IsVisible(hello.gpu) || !OnThisHost(hello)) continue;
    hidden += (hidden.empty() ? "" : ", ") + std::to_string(process);
  }
  if (hidden.empty()) return;
  processes_.warn("the GPUs of processes " + hidden +
                  " of the mesh are hidden from this one, probably by CUDA_VISIBLE_DEVICES: CUDA "
                  "then copies to them with SMs, not with copy engines, which slows what computes "
                  "meanwhile. Let each process see all GPUs of its host, and choose its own with "
                  "local_device_ids of jax.distributed.initialize.");
}

bool Opening::OnThisHost(const Hello& hello) const {
  return std::memcmp(hello.host, hellos_[processes_.index].host, sizeof(hello.host)) == 0;
}

std::byte* Opening::PointerAt(std::byte* own, int pe) const {
  static const bool puts_alone = std::getenv("JAX_SM_FREE_NVSHMEM_PUTS") != nullptr;
  return puts_alone ? nullptr : nvshmem_->PointerAt(own, pe);
}

int32_t Opening::HostLeader(const std::vector<int32_t>& processes) const {
  return *std::find_if(processes.begin(), processes.end(),
                       [&](int32_t process) { return OnThisHost(hellos_[process]); });
}

std::optional<Fault> Opening::ShareMemory() {
  struct OfGroup {
    Links links;
    ClosedNote closed;
  };
  std::vector<int32_t> all(hellos_.size());
  std::iota(all.begin(), all.end(), 0);
  struct Block {
    int32_t leader;  // makes it
    char suffix;     // of its name
    size_t bytes;
    std::shared_ptr<SharedMemory>& memory;
  };
  const Block blocks[] = {{HostLeader(processes_.of_rank), 'g', sizeof(OfGroup), group_memory_},
                          {HostLeader(all), 'm', sizeof(FaultNote), mesh_memory_}};
  const auto take = [&](bool as_leader) -> std::optional<Fault> {
    for (const Block& block : blocks) {
      if ((block.leader == processes_.index) != as_leader) continue;
      const std::string name = hellos_[block.leader].memory + std::string(1, block.suffix);
      auto made = as_leader ? SharedMemory::Create(name, block.bytes)
                            : SharedMemory::Open(name, block.bytes);
      if (const Fault* fault = FaultOf(made)) return *fault;
      block.memory = std::get<std::shared_ptr<SharedMemory>>(std::move(made));
    }
    return std::nullopt;
  };
  if (auto fault = take(true)) return fault;
  processes_.exchange("");
  if (auto fault = take(false)) return fault;
  auto* group = static_cast<OfGroup*>(group_memory_->data());
  auto* mesh = static_cast<FaultNote*>(mesh_memory_->data());
  neighbours_.crossbar =
      std::make_shared<Crossbar>(std::shared_ptr<Links>(group_memory_, &group->links));
  neighbours_.group_end =
      std::make_shared<GroupEnd>(std::shared_ptr<ClosedNote>(group_memory_, &group->closed),
                                 std::shared_ptr<FaultNote>(mesh_memory_, mesh));
  return std::nullopt;
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
  Opening opening(processes, device, std::get<Nvshmem*>(nvshmem));
  if (auto fault = opening.Meet()) return *fault;
  if (auto fault = opening.Join()) return *fault;
  if (auto fault = opening.FindRegions(config)) return *fault;
  if (auto fault = opening.ShareMemory()) return *fault;
  auto buffer = DeviceBuffer::Make(id, config, places, opening.neighbours());
  if (FaultOf(buffer) != nullptr) return buffer;
  // Nobody sends before all are ready to receive.
  processes.exchange("");
  opening.ForgetNames();
  return buffer;
}

}  // namespace jax_sm_free::cuda
