// Carries messages to ranks whose memory this GPU does not reach: from the host, through NVSHMEM,
// by a NIC.

#ifndef JAX_SM_FREE_CC_CUDA_HOST_COURIER_H_
#define JAX_SM_FREE_CC_CUDA_HOST_COURIER_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "cc/cuda/device_state.h"
#include "cc/cuda/processes/nvshmem.h"
#include "cc/fault.h"

namespace jax_sm_free::cuda {

// Kernels write notices and acknowledgements straight into the regions of other ranks. For a rank
// that is out of reach, they write them into its outbox here, a copy in pinned memory of the front
// of its region, and the courier brings them to the same place there. Messages it takes from where
// they were packed.
//
// Nothing of it runs on the GPU. NVSHMEM's own puts on a stream would: each is a kernel that waits
// for a thread of the host, and might find no SM while kernels that wait for messages hold all.
//
// A rank's messages stay where they were packed until they are acknowledged, so that nothing waits
// for the NIC but notices, whose outbox can be closed any time. Used by one thread, the mover's.
class Courier {
 public:
  // Outboxes for the ranks that have a number in `pes`, by rank; -1 for one within reach.
  static Result<std::shared_ptr<Courier>> Make(Nvshmem* nvshmem, const RegionLayout& regions,
                                               std::vector<int32_t> pes);
  ~Courier();
  Courier(const Courier&) = delete;
  Courier& operator=(const Courier&) = delete;

  bool Serves(int32_t dst) const { return pes_[dst] >= 0; }
  // What stands for the region of `dst`.
  std::byte* OutboxOf(int32_t dst) const { return outboxes_[dst]; }

  // Sends bytes of a packed message, and their signal behind them.
  void Send(const RankView& view, const CopyOrder& order);
  // Sends the notices and acknowledgements that have come into the outboxes. Whether there were
  // any.
  bool Forward(const RankView& view);

 private:
  Courier(Nvshmem* nvshmem, std::vector<int32_t> pes);
  std::optional<Fault> Open(const RegionLayout& regions);

  // The last that was sent on, by slot.
  struct Sent {
    std::array<uint64_t, kMaxSlots> notices{};
    std::array<uint64_t, kMaxSlots> acks{};
  };

  Nvshmem* const nvshmem_;
  const std::vector<int32_t> pes_;    // by rank
  std::vector<std::byte*> outboxes_;  // by rank; null for one within reach
  std::vector<Sent> sent_;            // by rank
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_HOST_COURIER_H_
