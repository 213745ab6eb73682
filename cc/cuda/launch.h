// Grid sizes, and loading kernels ahead of their first launch.

#ifndef JAX_SM_FREE_CC_CUDA_LAUNCH_H_
#define JAX_SM_FREE_CC_CUDA_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

namespace jax_sm_free::cuda {

inline constexpr int kRowThreads = 256;  // of a block that moves rows: eight warps, a row each

// As many blocks as the device holds at once: each takes its share of the rows.
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

// Whether the device has bulk copies (cp.async.bulk).
inline bool HasBulkCopies() {
  int device = 0;
  int major = 0;
  (void)cudaGetDevice(&device);
  (void)cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 9;
}

template <typename Kernel>
cudaError_t Load(Kernel kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel);
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_LAUNCH_H_
