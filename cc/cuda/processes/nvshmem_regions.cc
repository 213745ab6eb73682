#include "cc/cuda/processes/nvshmem_regions.h"

#include <cuda_runtime_api.h>

#include <cstring>
#include <string>
#include <utility>

#include "cc/cuda/host/refusal.h"

namespace jax_sm_free::cuda {

NvshmemRegions::NvshmemRegions(Nvshmem* nvshmem, std::byte* own, std::vector<int32_t> pes)
    : nvshmem_(nvshmem), own_(own), pes_(std::move(pes)) {}

NvshmemRegions::~NvshmemRegions() {
  for (std::byte* outbox : outboxes_) {
    nvshmem_->Unregister(outbox);
    (void)cudaFreeHost(outbox);
  }
}

Result<std::byte*> NvshmemRegions::MakeOutbox(size_t bytes) {
  void* outbox = nullptr;
  if (const cudaError_t error = cudaHostAlloc(&outbox, bytes, cudaHostAllocPortable);
      error != cudaSuccess) {
    return Refuse(std::to_string(bytes) + " bytes of pinned memory", cudaGetErrorString(error));
  }
  std::memset(outbox, 0, bytes);
  if (auto fault = nvshmem_->Register(outbox, bytes)) {
    (void)cudaFreeHost(outbox);
    return *fault;
  }
  return outboxes_.emplace_back(static_cast<std::byte*>(outbox));
}

void NvshmemRegions::Put(int32_t rank, int64_t offset, const std::byte* source, int64_t bytes) {
  nvshmem_->Put(own_ + offset, source, bytes, pes_[rank]);
}

void NvshmemRegions::PutAndWait(int32_t rank, int64_t offset, const std::byte* source,
                                int64_t bytes) {
  nvshmem_->PutAndWait(own_ + offset, source, bytes, pes_[rank]);
}

void NvshmemRegions::PutSignal(int32_t rank, int64_t offset, uint64_t value) {
  nvshmem_->PutSignal(own_ + offset, value, pes_[rank]);
}

}  // namespace jax_sm_free::cuda
