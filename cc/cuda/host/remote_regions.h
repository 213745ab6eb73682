// The seam between the courier and a transport: writes to ranks that this GPU does not reach.

#ifndef JAX_SM_FREE_CC_CUDA_HOST_REMOTE_REGIONS_H_
#define JAX_SM_FREE_CC_CUDA_HOST_REMOTE_REGIONS_H_

#include <cstddef>
#include <cstdint>

#include "cc/fault.h"

namespace jax_sm_free::cuda {

// Writes from the host into the regions of the ranks whose memory this GPU does not reach.
//
// A rank and an offset name a place: all ranks' regions have the same layout (device_state.h). The
// transport alone knows how the bytes get there. Bytes come from this rank's own region, in device
// memory, or from an outbox, in pinned memory.
//
// The courier calls this from one thread, the mover's. No function may need an SM, because kernels
// that wait for messages may hold all of them.
class RemoteRegions {
 public:
  // Frees the outboxes.
  virtual ~RemoteRegions() = default;

  // Whether this GPU does not reach `rank`. The functions below take such ranks only.
  virtual bool Serves(int32_t rank) const = 0;

  // Makes an outbox: `bytes` zeros in pinned memory, which kernels write and PutAndWait reads.
  virtual Result<std::byte*> MakeOutbox(size_t bytes) = 0;

  // Begins to copy `bytes` > 0 to `offset` in the region of `rank`. The source lies in this rank's
  // own region, and stays as it is until `rank` has acknowledged the message.
  virtual void Put(int32_t rank, int64_t offset, const std::byte* source, int64_t bytes) = 0;

  // Copies `bytes` > 0 to `offset` in the region of `rank`. The source lies in an outbox, and may
  // change as soon as this returns.
  virtual void PutAndWait(int32_t rank, int64_t offset, const std::byte* source, int64_t bytes) = 0;

  // Writes `value` to `offset` in the region of `rank`. When `rank` sees the value, it also sees
  // all bytes of the earlier calls for this rank.
  virtual void PutSignal(int32_t rank, int64_t offset, uint64_t value) = 0;
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_HOST_REMOTE_REGIONS_H_
