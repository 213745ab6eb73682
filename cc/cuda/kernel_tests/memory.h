// Memory that kernels and the host can reach, and waiting for kernels. Kernels run on the host
// (memory_on_host.cc) or on a GPU (memory_on_gpu.cc).

#ifndef JAX_SM_FREE_CC_CUDA_KERNEL_TESTS_MEMORY_H_
#define JAX_SM_FREE_CC_CUDA_KERNEL_TESTS_MEMORY_H_

#include <cstddef>
#include <vector>

namespace jax_sm_free::cuda::kernel_tests {

void* AllocateForKernels(size_t bytes);
void FreeForKernels(void* memory);

// Returns when all kernels that were launched have ended. Ends the process if one of them failed.
void AwaitKernels();

template <typename T>
struct KernelAllocator {
  using value_type = T;

  KernelAllocator() = default;
  template <typename U>
  KernelAllocator(const KernelAllocator<U>& /*other*/) {}  // NOLINT(google-explicit-constructor)

  T* allocate(size_t count) { return static_cast<T*>(AllocateForKernels(count * sizeof(T))); }
  void deallocate(T* memory, size_t /*count*/) { FreeForKernels(memory); }

  friend bool operator==(const KernelAllocator&, const KernelAllocator&) { return true; }
};

// An array that kernels read and write.
template <typename T>
using Array = std::vector<T, KernelAllocator<T>>;

}  // namespace jax_sm_free::cuda::kernel_tests

#endif  // JAX_SM_FREE_CC_CUDA_KERNEL_TESTS_MEMORY_H_
