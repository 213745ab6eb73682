// Bulk copies from memory to shared memory, and the barriers that say when they have arrived. Only
// Hopper's SMs and newer ones have them.
//
// A barrier has phases. Its parity is that of the phase that is not complete yet. A phase completes
// when one thread has arrived, and the bytes that it expects have been written.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_BULK_COPY_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_BULK_COPY_CUH_

#include <cstddef>
#include <cstdint>

#ifndef __CUDACC__
#include <cstring>
#endif

namespace jax_sm_free::cuda {

#ifdef __CUDACC__

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr bool kHasBulkCopies = false;  // the code exists, but is never launched
#else
inline constexpr bool kHasBulkCopies = true;
#endif

__device__ inline uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline void InitBarrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(SharedAddress(barrier)) : "memory");
}

// Makes new barriers visible to bulk copies.
__device__ inline void FenceBarriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and expects this number of bytes.
__device__ inline void Expect(uint64_t* barrier, int32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}

// Begins to copy. Both addresses and `bytes` are multiples of 16.
__device__ inline void BulkCopy(void* shared, const std::byte* source, int32_t bytes,
                                uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(SharedAddress(shared)),
      "l"(source), "r"(bytes), "r"(SharedAddress(barrier))
      : "memory");
}

// Waits for the end of the phase with this parity.
__device__ inline void AwaitPhase(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(SharedAddress(barrier)), "r"(parity)
        : "memory");
  }
}

#else  // Kernels compiled for the host: cc/cuda/emulation. A barrier counts completed phases.

inline constexpr bool kHasBulkCopies = true;

inline void InitBarrier(uint64_t* barrier) { *barrier = 0; }
inline void FenceBarriers() {}
inline void Expect(uint64_t* barrier, int32_t bytes) { *barrier += bytes == 0 ? 1 : 0; }
inline void BulkCopy(void* shared, const std::byte* source, int32_t bytes, uint64_t* barrier) {
  std::memcpy(shared, source, bytes);
  ++*barrier;
}
inline void AwaitPhase(uint64_t* barrier, uint32_t parity) {
  while (*barrier % 2 == parity) __nanosleep(100);
}

#endif

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_BULK_COPY_CUH_
