// Launching kernels: grid sizes, chains of kernels, and loading ahead of the first launch.
//
// The kernels of a call run one after the other, and each is short compared to the time that a
// launch takes. So the first kernel is launched as usual, and each further kernel behind it
// (EnqueueBehind). On Hopper, the blocks of a further kernel may then start before the previous
// kernel has ended:
//
//   count  ---------| admits place           what place reads of the operands alone
//   place       ....----------| admits pack
//   pack                  ....-------------  . in AwaitPrevious
//
// A kernel that is launched behind another calls AwaitPrevious in all threads. It does so before it
// reads anything that earlier kernels of the call write, and before it writes anything that they
// read. So it ends after all kernels before it, and the next kernel relies on this. The first
// kernel of a call starts when everything that was enqueued before the call has ended. So all
// kernels may read operands at once.

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

// Of a block that moves rows: eight warps, each of which moves a row.
inline constexpr int kRowThreads = 256;

// As many blocks as fit on the device at once. Each block takes its share of the rows. This is the
// largest number of blocks that are launched.
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

// The number of blocks for this number of warps, and at most `most`.
inline int BlocksFor(int64_t num_warps, int most, int threads = kRowThreads) {
  const int64_t per_block = threads / kWarpSize;
  const int64_t needed = (num_warps + per_block - 1) / per_block;
  return static_cast<int>(std::clamp<int64_t>(needed, 1, most));
}

// The number of blocks for this number of warps, and one more: the first block is the watch
// (device.cuh).
inline int BlocksAndWatch(int64_t num_warps, int most, int threads = kRowThreads) {
  return 1 + BlocksFor(num_warps, std::max(most - 1, 1), threads);
}

// Whether the device has the features that came with Hopper: bulk copies, and launches behind
// another kernel.
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

// Enqueues a kernel with these attributes. cudaGetLastError returns an error of the launch.
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

// Enqueues a kernel that starts when everything before it has ended.
template <typename... Params>
void Enqueue(void (*kernel)(Params...), const Grid& grid, cudaStream_t stream,
             const std::type_identity_t<Params>&... args) {
  EnqueueWith({}, kernel, grid, stream, args...);
}

// Enqueues a kernel behind another kernel of the same call. The kernel must call AwaitPrevious.
template <typename... Params>
void EnqueueBehind(void (*kernel)(Params...), const Grid& grid, cudaStream_t stream,
                   const std::type_identity_t<Params>&... args) {
  static const bool may_begin_early = IsHopperOrNewer();
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  EnqueueWith({&early, may_begin_early ? size_t{1} : size_t{0}}, kernel, grid, stream, args...);
}

// The shared memory that a kernel was launched with. emulation/fibers.h defines it for the host.
template <typename T>
__device__ T* DynamicShared() {
#ifdef __CUDACC__
  extern __shared__ int64_t dynamic_shared[];
#endif
  return reinterpret_cast<T*>(dynamic_shared);
}

// Waits until the previous kernel has ended, and everything that it wrote is visible.
__device__ inline void AwaitPrevious() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the blocks of the next kernel start where this kernel leaves room, once all blocks have
// called this or ended. A block that waits for peers calls it afterwards: at most one block may
// occupy an SM while it waits for peers.
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
