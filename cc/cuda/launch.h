// Grid sizes, and loading kernels ahead of their first launch.

#ifndef JAX_SM_FREE_CC_CUDA_LAUNCH_H_
#define JAX_SM_FREE_CC_CUDA_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

namespace jax_sm_free::cuda {

inline constexpr int kRowThreads = 256;  // of a block that moves rows: eight warps, a row each

// Blocks for `num_rows` rows, at most as many as the device holds at once.
template <typename Kernel>
int RowBlocks(Kernel kernel, int64_t num_rows) {
  int device = 0;
  int num_sms = 1;
  int per_sm = 1;
  (void)cudaGetDevice(&device);
  (void)cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  (void)cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, kRowThreads, 0);
  const int64_t wanted = (num_rows + kRowThreads / 32 - 1) / (kRowThreads / 32);
  return static_cast<int>(std::clamp<int64_t>(wanted, 1, int64_t{num_sms} * std::max(per_sm, 1)));
}

template <typename Kernel>
cudaError_t Load(Kernel kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel);
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_LAUNCH_H_
