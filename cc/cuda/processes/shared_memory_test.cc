#include "cc/cuda/processes/shared_memory.h"

#include <sys/wait.h>
#include <unistd.h>

#include <memory>
#include <string>
#include <variant>

#include "gtest/gtest.h"

namespace jax_sm_free::cuda {
namespace {

using Shared = std::shared_ptr<SharedMemory>;

std::string Name() { return "/jax_sm_free_test." + std::to_string(getpid()); }

int* Word(const Shared& shared) { return static_cast<int*>(shared->data()); }

TEST(SharedMemory, BothSeeTheSame) {
  const auto here = std::get<Shared>(SharedMemory::Create(Name(), 4096));
  EXPECT_EQ(*Word(here), 0);
  const auto there = std::get<Shared>(SharedMemory::Open(Name(), 4096));
  *Word(here) = 7;
  EXPECT_EQ(*Word(there), 7);
}

TEST(SharedMemory, AnotherProcessWritesIt) {
  const auto here = std::get<Shared>(SharedMemory::Create(Name(), 4096));
  const std::string name = Name();
  const pid_t child = fork();
  if (child == 0) {
    auto there = SharedMemory::Open(name, 4096);
    if (FaultOf(there) == nullptr) *Word(std::get<Shared>(there)) = 9;
    _exit(0);
  }
  waitpid(child, nullptr, 0);
  EXPECT_EQ(*Word(here), 9);
}

TEST(SharedMemory, NothingIsLeftUnderItsName) {
  {
    const auto here = std::get<Shared>(SharedMemory::Create(Name(), 4096));
    here->Unname();
    const auto late = SharedMemory::Open(Name(), 4096);
    ASSERT_NE(FaultOf(late), nullptr);
    EXPECT_NE(FaultOf(late)->seen.find("No such file"), std::string::npos);
    const auto again = std::get<Shared>(SharedMemory::Create(Name(), 4096));
  }
  EXPECT_NE(FaultOf(SharedMemory::Open(Name(), 4096)), nullptr);
}

TEST(SharedMemory, ANameIsTakenOnce) {
  const auto here = std::get<Shared>(SharedMemory::Create(Name(), 4096));
  const auto second = SharedMemory::Create(Name(), 4096);
  ASSERT_NE(FaultOf(second), nullptr);
  EXPECT_NE(FaultOf(second)->expected.find(Name()), std::string::npos);
}

TEST(SharedMemory, HostIsTheSameInOneProcess) {
  EXPECT_EQ(MemoryHost(), MemoryHost());
  EXPECT_GT(MemoryHost().size(), 30U);  // a boot id is there
}

}  // namespace
}  // namespace jax_sm_free::cuda
