#include "cc/cuda/processes/host_memory.h"

#include <string>
#include <utility>
#include <variant>

#include "cc/cuda/processes/testing.h"
#include "gtest/gtest.h"

namespace jax_sm_free::cuda {
namespace {

using testing::MakeGpuId;
using testing::RunProcesses;

HostMemory MeetAndShare(Rendezvous& rendezvous) {
  EXPECT_EQ(FaultOf(rendezvous.Meet("")), nullptr);
  Result<HostMemory> shared = HostMemory::Share(rendezvous);
  EXPECT_EQ(FaultOf(shared), nullptr);
  return std::get<HostMemory>(std::move(shared));
}

TEST(HostMemory, AGroupSharesItsLinks) {
  RunProcesses(2, [](const Processes& processes) {
    Rendezvous rendezvous(processes, MakeGpuId(processes.index));
    const HostMemory memory = MeetAndShare(rendezvous);
    const auto crossbar = memory.crossbar();
    const Crossbar::Ticket ticket = processes.index == 0 ? crossbar->TryTake(1) : 0;
    processes.exchange("");
    if (processes.index == 1) {
      EXPECT_EQ(crossbar->TryTake(1), 0);
    }
    processes.exchange("");
    if (processes.index == 0) crossbar->Release(1, ticket);
    processes.exchange("");
    if (processes.index == 1) {
      EXPECT_NE(crossbar->TryTake(1), 0);
    }
  });
}

TEST(HostMemory, GroupsShareFaultsAndNotClosings) {
  RunProcesses(2, [](const Processes& all) {
    Processes processes = all;
    processes.of_rank = {all.index};  // Each process is a group.
    Rendezvous rendezvous(processes, MakeGpuId(processes.index));
    const HostMemory memory = MeetAndShare(rendezvous);
    const auto end = memory.group_end();
    if (processes.index == 0) end->TellClosed();
    processes.exchange("");
    EXPECT_EQ(end->HasCome(), processes.index == 0);
    processes.exchange("");
    if (processes.index == 1) end->TellFault("a fault");
    processes.exchange("");
    EXPECT_EQ(end->Fault(), "a fault");
  });
}

TEST(HostMemory, HostsShareNothing) {
  RunProcesses(2, [](const Processes& processes) {
    Rendezvous rendezvous(processes, MakeGpuId(processes.index), std::to_string(processes.index));
    const HostMemory memory = MeetAndShare(rendezvous);
    const auto end = memory.group_end();
    if (processes.index == 0) end->TellFault("a fault");
    processes.exchange("");
    EXPECT_EQ(end->HasCome(), processes.index == 0);
  });
}

TEST(HostMemory, NoNameIsLeft) {
  RunProcesses(2, [](const Processes& processes) {
    Rendezvous rendezvous(processes, MakeGpuId(processes.index));
    const HostMemory memory = MeetAndShare(rendezvous);
    const std::string name = rendezvous.MemoryNameOf(0);
    EXPECT_EQ(FaultOf(SharedMemory::Open(name + "g", 64)), nullptr);
    EXPECT_EQ(FaultOf(SharedMemory::Open(name + "m", 64)), nullptr);
    processes.exchange("");
    memory.ForgetNames();
    processes.exchange("");
    EXPECT_NE(FaultOf(SharedMemory::Open(name + "g", 64)), nullptr);
    EXPECT_NE(FaultOf(SharedMemory::Open(name + "m", 64)), nullptr);
  });
}

}  // namespace
}  // namespace jax_sm_free::cuda
