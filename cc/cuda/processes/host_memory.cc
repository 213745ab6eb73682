#include "cc/cuda/processes/host_memory.h"

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace jax_sm_free::cuda {
namespace {

struct OfGroup {
  Links links;
  ClosedNote closed;
};

// A part of a block, which keeps all of it.
template <typename T>
std::shared_ptr<T> PartOf(const std::shared_ptr<SharedMemory>& block, T* part) {
  return {block, part};
}

OfGroup* GroupIn(const std::shared_ptr<SharedMemory>& block) {
  return static_cast<OfGroup*>(block->data());
}

}  // namespace

Result<HostMemory> HostMemory::Share(const Rendezvous& rendezvous) {
  std::vector<int32_t> all(rendezvous.num_processes());
  std::iota(all.begin(), all.end(), 0);
  struct Block {
    int32_t leader;  // creates it
    char suffix;     // of its name
    size_t bytes;
    std::shared_ptr<SharedMemory> memory;
  };
  Block blocks[] = {
      {rendezvous.HostLeader(rendezvous.processes().of_rank), 'g', sizeof(OfGroup), nullptr},
      {rendezvous.HostLeader(all), 'm', sizeof(FaultNote), nullptr}};
  const auto take = [&](bool as_leader) -> std::optional<Fault> {
    for (Block& block : blocks) {
      if ((block.leader == rendezvous.processes().index) != as_leader) continue;
      const std::string name = rendezvous.MemoryNameOf(block.leader) + block.suffix;
      auto made = as_leader ? SharedMemory::Create(name, block.bytes)
                            : SharedMemory::Open(name, block.bytes);
      if (const Fault* fault = FaultOf(made)) return *fault;
      block.memory = std::get<std::shared_ptr<SharedMemory>>(std::move(made));
    }
    return std::nullopt;
  };
  if (auto fault = take(true)) return *fault;
  rendezvous.processes().exchange("");
  if (auto fault = take(false)) return *fault;
  return HostMemory(std::move(blocks[0].memory), std::move(blocks[1].memory));
}

std::shared_ptr<Crossbar> HostMemory::crossbar() const {
  return std::make_shared<Crossbar>(PartOf(group_, &GroupIn(group_)->links));
}

std::shared_ptr<GroupEnd> HostMemory::group_end() const {
  return std::make_shared<GroupEnd>(PartOf(group_, &GroupIn(group_)->closed),
                                    PartOf(mesh_, static_cast<FaultNote*>(mesh_->data())));
}

void HostMemory::ForgetNames() const {
  for (const auto& block : {group_, mesh_}) block->Unname();
}

}  // namespace jax_sm_free::cuda
