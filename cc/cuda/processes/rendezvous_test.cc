#include "cc/cuda/processes/rendezvous.h"

#include <cstdlib>
#include <set>
#include <string>
#include <variant>
#include <vector>

#include "cc/cuda/processes/testing.h"
#include "gtest/gtest.h"

namespace jax_sm_free::cuda {
namespace {

using testing::MakeGpuId;
using testing::RunProcesses;
using Words = std::vector<std::string>;

TEST(Rendezvous, AllHearTheWordsOfAll) {
  RunProcesses(3, [](const Processes& processes) {
    Rendezvous rendezvous(processes, MakeGpuId(processes.index));
    const auto met = rendezvous.Meet("words " + std::to_string(processes.index));
    ASSERT_EQ(FaultOf(met), nullptr);
    EXPECT_EQ(std::get<Words>(met), (Words{"words 0", "words 1", "words 2"}));
    EXPECT_EQ(rendezvous.num_processes(), 3);
    for (int32_t i = 0; i < 3; ++i) EXPECT_EQ(rendezvous.GpuOf(i), MakeGpuId(i));
  });
}

TEST(Rendezvous, MemoryOfEachProcessHasANameOfItsOwn) {
  RunProcesses(3, [](const Processes& processes) {
    Rendezvous rendezvous(processes, MakeGpuId(processes.index));
    ASSERT_EQ(FaultOf(rendezvous.Meet("")), nullptr);
    std::set<std::string> names;
    for (int32_t i = 0; i < 3; ++i) names.insert(rendezvous.MemoryNameOf(i));
    EXPECT_EQ(names.size(), 3U);
    for (const std::string& name : names) EXPECT_EQ(name.find("/jax_sm_free."), 0U);
  });
}

TEST(Rendezvous, ThePlaceOfAProcessIsItsHost) {
  RunProcesses(4, [](const Processes& processes) {
    const bool in_first = processes.index % 2 == 0;
    Rendezvous rendezvous(processes, MakeGpuId(processes.index), in_first ? "first" : "second");
    ASSERT_EQ(FaultOf(rendezvous.Meet("")), nullptr);
    for (int32_t i = 0; i < 4; ++i) EXPECT_EQ(rendezvous.OnThisHost(i), (i % 2 == 0) == in_first);
    EXPECT_EQ(rendezvous.HostLeader({0, 1, 2, 3}), in_first ? 0 : 1);
    EXPECT_EQ(rendezvous.HostLeader({3, 2, 1}), in_first ? 2 : 3);
  });
}

TEST(Rendezvous, TwoProcessesOnOneGpuAreRefusedInAll) {
  RunProcesses(3, [](const Processes& processes) {
    Rendezvous rendezvous(processes, MakeGpuId(processes.index == 2 ? 1 : processes.index));
    const auto met = rendezvous.Meet("");
    ASSERT_NE(FaultOf(met), nullptr);
    EXPECT_EQ(FaultOf(met)->expected, "a GPU for each process");
    EXPECT_EQ(FaultOf(met)->seen.find("processes 1 and 2 of the mesh with the same one"), 0U);
  });
}

TEST(Rendezvous, ProcessesShareAGpuIfTheyMay) {
  setenv("JAX_SM_FREE_SHARED_GPUS", "1", 1);
  RunProcesses(2, [](const Processes& processes) {
    EXPECT_EQ(FaultOf(Rendezvous(processes, MakeGpuId(0)).Meet("")), nullptr);
  });
  unsetenv("JAX_SM_FREE_SHARED_GPUS");
}

TEST(Rendezvous, AGreetingThatIsTooShortIsRefused) {
  const auto exchange = [](const std::string& text) { return Words{text, "hello"}; };
  const Processes processes{0, {0, 1}, exchange, {}};
  const auto met = Rendezvous(processes, MakeGpuId(0)).Meet("");
  ASSERT_NE(FaultOf(met), nullptr);
  EXPECT_EQ(FaultOf(met)->seen, "5");
}

}  // namespace
}  // namespace jax_sm_free::cuda
