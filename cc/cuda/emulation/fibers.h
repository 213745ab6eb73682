// Runs kernels on one thread of the host, for tests on machines without a GPU: a fiber for each
// thread of a block, and blocks one after the other, the first one last. What threads of a warp or
// a block do together are meetings of their fibers; between two of them a fiber runs alone.
//
// This shows what a kernel computes. It shows neither races, nor what memory order allows, nor what
// needs two blocks at once: of our kernels' blocks only the first may wait for others.

#ifndef JAX_SM_FREE_CC_CUDA_EMULATION_FIBERS_H_
#define JAX_SM_FREE_CC_CUDA_EMULATION_FIBERS_H_

#include <cstddef>
#include <cstdint>
#include <functional>

namespace jax_sm_free::cuda::emulation {

struct Index {
  unsigned x = 0;
};

// A kernel's launch. A kernel that stands still ends the process, and says so.
struct Grid {
  unsigned blocks;
  unsigned threads;
  size_t shared_bytes;
};
void Run(const Grid& grid, const std::function<void()>& kernel);

// Called by the running fiber. Who has ended counts as there.
void MeetWarp();
void MeetBlock();
bool AllOfBlock(bool value);
// Lets the others run: in loops that wait.
void Yield();

// A value for each lane of the running fiber's warp, and which lanes have not ended.
uint64_t* WarpValues();
unsigned LiveLanes();

}  // namespace jax_sm_free::cuda::emulation

// As kernels name them.
extern jax_sm_free::cuda::emulation::Index threadIdx;
extern jax_sm_free::cuda::emulation::Index blockIdx;
extern jax_sm_free::cuda::emulation::Index blockDim;
extern jax_sm_free::cuda::emulation::Index gridDim;
extern int64_t dynamic_shared[];

#endif  // JAX_SM_FREE_CC_CUDA_EMULATION_FIBERS_H_
