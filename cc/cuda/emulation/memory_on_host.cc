#include <new>

#include "cc/cuda/emulation/memory.h"

namespace jax_sm_free::cuda::emulation {

void* AllocateForKernels(size_t bytes) { return ::operator new(bytes); }
void FreeForKernels(void* memory) { ::operator delete(memory); }

void AwaitKernels() {}  // A launch returns when its kernel has ended.

}  // namespace jax_sm_free::cuda::emulation
