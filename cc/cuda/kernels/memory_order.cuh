// Loads and stores that order other accesses, visible to all GPUs and the host; counters for the
// threads of this GPU; and the clock of the GPU.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_MEMORY_ORDER_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_MEMORY_ORDER_CUH_

#include <cstdint>

#ifndef __CUDACC__
#include <atomic>
#include <chrono>
#endif

namespace jax_sm_free::cuda {

#ifdef __CUDACC__

__device__ inline uint64_t LoadAcquire(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

__device__ inline void StoreRelease(uint64_t* address, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

__device__ inline void StoreRelaxed(uint64_t* address, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

__device__ inline uint32_t LoadAcquire(const uint32_t* counter) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

__device__ inline void CountRelease(uint32_t* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ inline uint64_t Nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

#else  // Kernels compiled for the host: cc/cuda/emulation.

inline uint64_t LoadAcquire(const uint64_t* address) {
  return std::atomic_ref(*const_cast<uint64_t*>(address)).load(std::memory_order_acquire);
}

inline void StoreRelease(uint64_t* address, uint64_t value) {
  std::atomic_ref(*address).store(value, std::memory_order_release);
}

inline void StoreRelaxed(uint64_t* address, uint64_t value) {
  std::atomic_ref(*address).store(value, std::memory_order_relaxed);
}

inline uint32_t LoadAcquire(const uint32_t* counter) { return *counter; }

inline void CountRelease(uint32_t* counter) { ++*counter; }

inline uint64_t Nanoseconds() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

#endif

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_MEMORY_ORDER_CUH_
