// Launching kernels: grid sizes, chains of kernels, and loading ahead of the first launch.
//
// The kernels of one call run one behind the other, and each is short beside the time that a launch
// takes. So the first is launched as usual, and the others behind it (EnqueueBehind) so that, on
// Hopper, their blocks may be there before the kernel before has ended:
//
//   count  ---------| admits place           what place reads of the operands alone
//   place       ....----------| admits pack
//   pack                  ....-------------  . in AwaitPrevious
//
// A kernel launched behind another calls AwaitPrevious in all threads, before it reads what other
// kernels of the call write and before it writes what they read. It so ends after all kernels
// before it, which is what the next one relies on. What was enqueued before the call has ended when
// its first kernel begins: operands may be read at once.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_LAUNCH_H_
#define JAX_SM_FREE_CC_CUDA_KERNELS_LAUNCH_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "cc/cuda/kernels/warp.cuh"

namespace jax_sm_free::cuda {

inline constexpr int kRowThreads = 256;  // of a block that moves rows: eight warps, a row each

// As many blocks as the device holds at once: each takes its share of the rows. At most that many
// are launched.
template <typename Kernel>
int FullGrid(Kernel kernel, int threads = kRowThreads) {
  int device = 0;
  int num_sms = 1;
  int per_sm = 1;
  (void)cudaGetDevice(&device);
  (void)cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  (void)cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, 0);
  return num_sms * std::max(per_sm, 1);
}

// Blocks for the work of so many warps: no more of them than are of use.
inline int BlocksFor(int64_t num_warps, int most, int threads = kRowThreads) {
  const int64_t per_block = threads / kWarpSize;
  const int64_t needed = (num_warps + per_block - 1) / per_block;
  return static_cast<int>(std::clamp<int64_t>(needed, 1, most));
}

// The same and one more, the first: the watch (device.cuh) of the others.
inline int BlocksAndWatch(int64_t num_warps, int most, int threads = kRowThreads) {
  return 1 + BlocksFor(num_warps, std::max(most - 1, 1), threads);
}

// Whether the device has what came with Hopper: bulk copies, and launches behind another kernel.
inline bool IsHopperOrNewer() {
  int device = 0;
  int major = 0;
  (void)cudaGetDevice(&device);
  (void)cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 9;
}

struct Grid {
  int blocks;
  int threads;
  size_t shared_bytes = 0;
};

// Enqueues a kernel with these attributes. An error is cudaGetLastError's.
template <typename... Params>
void EnqueueWith(std::span<cudaLaunchAttribute> attributes, void (*kernel)(Params...),
                 const Grid& grid, cudaStream_t stream,
                 const std::type_identity_t<Params>&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  config.attrs = attributes.data();
  config.numAttrs = static_cast<unsigned>(attributes.size());
  (void)cudaLaunchKernelEx(&config, kernel, args...);
}

// Enqueues a kernel that begins when all before it has ended.
template <typename... Params>
void Enqueue(void (*kernel)(Params...), const Grid& grid, cudaStream_t stream,
             const std::type_identity_t<Params>&... args) {
  EnqueueWith({}, kernel, grid, stream, args...);
}

// The same right behind another kernel of the same call, for one that calls AwaitPrevious.
template <typename... Params>
void EnqueueBehind(void (*kernel)(Params...), const Grid& grid, cudaStream_t stream,
                   const std::type_identity_t<Params>&... args) {
  static const bool may_begin_early = IsHopperOrNewer();
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  EnqueueWith({&early, may_begin_early ? size_t{1} : size_t{0}}, kernel, grid, stream, args...);
}

// The shared memory that a kernel was launched with. On the host, emulation/fibers.h has it.
template <typename T>
__device__ T* DynamicShared() {
#ifdef __CUDACC__
  extern __shared__ int64_t dynamic_shared[];
#endif
  return reinterpret_cast<T*>(dynamic_shared);
}

// Waits until the kernel before has ended, and all that it wrote is there.
__device__ inline void AwaitPrevious() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks in, where this one leaves room, once all blocks have called it or
// ended. Not before this block has waited for peers: no more than one block may hold an SM for
// them.
__device__ inline void AdmitNext() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <typename Kernel>
cudaError_t Load(Kernel kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel);
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_LAUNCH_H_
