#include "cc/cuda/driver.h"

#include <cuda.h>

namespace jax_sm_free::cuda {
namespace {

template <typename Function>
Function Find(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  constexpr unsigned kSince = 12000;  // CUDA 12.0: the 64-bit operations without older flags
  if (cudaGetDriverEntryPointByVersion(name, &found, kSince, cudaEnableDefault, &result) !=
      cudaSuccess) {
    return nullptr;
  }
  return reinterpret_cast<Function>(found);
}

}  // namespace

cudaError_t WriteBehind(cudaStream_t stream, uint64_t* address, uint64_t value) {
  static const auto write = Find<decltype(&cuStreamWriteValue64)>("cuStreamWriteValue64");
  if (write == nullptr) return cudaErrorNotSupported;
  const CUresult result = write(stream, reinterpret_cast<CUdeviceptr>(address), value, 0);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace jax_sm_free::cuda
