#include "cc/cuda/host/driver.h"

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

cudaError_t WriteBehind(cudaStream_t stream, const std::array<Write, 2>& writes) {
  static const auto batch = Find<decltype(&cuStreamBatchMemOp)>("cuStreamBatchMemOp");
  if (batch == nullptr) return cudaErrorNotSupported;
  std::array<CUstreamBatchMemOpParams, 2> ops{};
  for (size_t i = 0; i < ops.size(); ++i) {
    ops[i].writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_64;
    ops[i].writeValue.address = reinterpret_cast<CUdeviceptr>(writes[i].address);
    ops[i].writeValue.value64 = writes[i].value;
  }
  const CUresult result = batch(stream, ops.size(), ops.data(), 0);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace jax_sm_free::cuda
