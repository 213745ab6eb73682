#include "cc/cuda/emulation/fibers.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

// Leaves one stack for another: what the callee has to keep goes onto the first.
asm(R"(
.text
smf_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void smf_switch_stacks(void** left, void* entered);

jax_sm_free::cuda::emulation::Index threadIdx;
jax_sm_free::cuda::emulation::Index blockIdx;
jax_sm_free::cuda::emulation::Index blockDim;
jax_sm_free::cuda::emulation::Index gridDim;

constexpr size_t kSharedWords = 32 * 1024;
int64_t dynamic_shared[kSharedWords];

namespace jax_sm_free::cuda::emulation {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = size_t{128} << 10;
constexpr int kSavedRegisters = 6;      // of smf_switch_stacks
constexpr int kMostRounds = 1'000'000;  // in which all fibers run and none gets on

// Fibers that meet: a warp, or a block.
struct Group {
  int members = 0;
  int arrived = 0;
  uint64_t meetings = 0;
};

struct Warp {
  Group group;
  unsigned lanes = 0;
  uint64_t values[kWarp] = {};
};

struct Fiber {
  unsigned thread = 0;
  bool ended = false;
  void* stack = nullptr;  // its top, while others run
};

struct Block {
  std::vector<char> stacks;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Group group;
  bool all = true;
  const std::function<void()>* kernel = nullptr;
  Fiber* running = nullptr;
  void* scheduler = nullptr;  // its stack
  uint64_t progress = 0;      // meetings and ends
} block;

Warp& OwnWarp() { return block.warps[threadIdx.x / kWarp]; }

void End(Group& group) {
  group.arrived = 0;
  ++group.meetings;
  ++block.progress;
}

void Meet(Group& group) {
  const uint64_t before = group.meetings;
  if (++group.arrived == group.members) return End(group);
  while (group.meetings == before) Yield();
}

void Leave(Group& group) {
  if (--group.members > 0 && group.arrived == group.members) End(group);
}

// What a fiber runs.
void Main() {
  (*block.kernel)();
  Warp& warp = OwnWarp();
  warp.lanes &= ~(1U << threadIdx.x % kWarp);
  Leave(warp.group);
  Leave(block.group);
  block.running->ended = true;
  ++block.progress;
  smf_switch_stacks(&block.running->stack, block.scheduler);
}

void Prepare(Fiber& fiber, unsigned thread) {
  Warp& warp = block.warps[thread / kWarp];
  ++warp.group.members;
  warp.lanes |= 1U << thread % kWarp;
  auto end = reinterpret_cast<uintptr_t>(block.stacks.data() + (thread + 1) * kStackBytes);
  auto** top = reinterpret_cast<void**>(end & ~uintptr_t{15});
  *--top = nullptr;  // where Main would return to
  *--top = reinterpret_cast<void*>(&Main);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  fiber = {thread, false, top};
}

void RunBlock(unsigned number, unsigned threads, size_t shared_bytes) {
  blockIdx = {number};
  std::memset(dynamic_shared, 0x5A, shared_bytes);
  block.warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  block.group = Group{.members = static_cast<int>(threads)};
  for (unsigned thread = 0; thread < threads; ++thread) Prepare(block.fibers[thread], thread);
  int idle = 0;
  for (unsigned left = threads; left > 0;) {
    const uint64_t before = block.progress;
    left = 0;
    for (Fiber& fiber : block.fibers) {
      if (fiber.ended) continue;
      ++left;
      block.running = &fiber;
      threadIdx = {fiber.thread};
      smf_switch_stacks(&block.scheduler, fiber.stack);
    }
    idle = block.progress == before ? idle + 1 : 0;
    if (idle < kMostRounds) continue;
    std::fprintf(stderr, "block %u of %u: %u threads wait for what does not come\n", number,
                 gridDim.x, left);
    std::abort();
  }
}

}  // namespace

void Run(const Grid& grid, const std::function<void()>& kernel) {
  if (grid.shared_bytes > sizeof(dynamic_shared)) std::abort();
  gridDim = {grid.blocks};
  blockDim = {grid.threads};
  block.kernel = &kernel;
  block.stacks.resize(kStackBytes * grid.threads);
  block.fibers.resize(grid.threads);
  for (unsigned number = grid.blocks; number-- > 0;) {
    RunBlock(number, grid.threads, grid.shared_bytes);
  }
}

void Yield() { smf_switch_stacks(&block.running->stack, block.scheduler); }
void MeetWarp() { Meet(OwnWarp().group); }
void MeetBlock() { Meet(block.group); }

bool AllOfBlock(bool value) {
  MeetBlock();
  block.all = true;
  MeetBlock();
  if (!value) block.all = false;
  MeetBlock();
  return block.all;
}

uint64_t* WarpValues() { return OwnWarp().values; }
unsigned LiveLanes() { return OwnWarp().lanes; }

}  // namespace jax_sm_free::cuda::emulation
