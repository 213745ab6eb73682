#include <new>

#include "cc/cuda/kernel_tests/memory.h"

namespace jax_sm_free::cuda::kernel_tests {

void* AllocateForKernels(size_t bytes) { return ::operator new(bytes); }
void FreeForKernels(void* memory) { ::operator delete(memory); }

void AwaitKernels() {}  // A launch returns when its kernel has ended.

}  // namespace jax_sm_free::cuda::kernel_tests
