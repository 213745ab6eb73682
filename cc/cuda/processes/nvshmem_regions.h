// The regions of the ranks that NVSHMEM alone reaches.

#ifndef JAX_SM_FREE_CC_CUDA_PROCESSES_NVSHMEM_REGIONS_H_
#define JAX_SM_FREE_CC_CUDA_PROCESSES_NVSHMEM_REGIONS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cc/cuda/host/remote_regions.h"
#include "cc/cuda/processes/nvshmem.h"
#include "cc/fault.h"

namespace jax_sm_free::cuda {

// Regions that are one symmetric block of memory. A NIC moves the bytes.
class NvshmemRegions : public RemoteRegions {
 public:
  // `own` is this rank's region, which outlives this object. `pes` has, by rank, the PE of a rank
  // out of reach, and -1 for a rank within reach.
  NvshmemRegions(Nvshmem* nvshmem, std::byte* own, std::vector<int32_t> pes);
  ~NvshmemRegions() override;
  NvshmemRegions(const NvshmemRegions&) = delete;
  NvshmemRegions& operator=(const NvshmemRegions&) = delete;

  bool Serves(int32_t rank) const override { return pes_[rank] >= 0; }
  Result<std::byte*> MakeOutbox(size_t bytes) override;
  void Put(int32_t rank, int64_t offset, const std::byte* source, int64_t bytes) override;
  void PutAndWait(int32_t rank, int64_t offset, const std::byte* source, int64_t bytes) override;
  void PutSignal(int32_t rank, int64_t offset, uint64_t value) override;

 private:
  Nvshmem* const nvshmem_;
  std::byte* const own_;
  const std::vector<int32_t> pes_;    // by rank
  std::vector<std::byte*> outboxes_;  // pinned and registered
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_PROCESSES_NVSHMEM_REGIONS_H_
