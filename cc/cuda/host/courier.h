// Carries messages to the ranks whose memory this GPU does not reach.

#ifndef JAX_SM_FREE_CC_CUDA_HOST_COURIER_H_
#define JAX_SM_FREE_CC_CUDA_HOST_COURIER_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "cc/config.h"
#include "cc/cuda/device_state.h"
#include "cc/cuda/host/remote_regions.h"
#include "cc/cuda/rank_view.h"
#include "cc/fault.h"

namespace jax_sm_free::cuda {

// Kernels write notices and acknowledgements straight into the regions of the ranks that their GPU
// reaches. A rank out of reach has an outbox instead: a copy, in pinned memory, of the front of its
// region, up to the messages. Kernels write into the outbox as they would into the region, and the
// courier copies what is new to the same place in the region. The courier takes messages from where
// kernels packed them.
//
// All of this happens on the host. Copies that a stream orders would not do: NVSHMEM, for one,
// issues each of them as a kernel, which finds no SM while kernels that wait for messages hold all.
//
// A packed message stays as it is until its receiver has acknowledged it, so the courier does not
// wait for its bytes to leave. A kernel may write the next notice at any time, so the courier waits
// until a notice has left its outbox.
//
// The mover's thread alone uses a courier.
class Courier {
 public:
  // Makes an outbox for each rank that `remote` serves.
  static Result<std::shared_ptr<Courier>> Make(std::unique_ptr<RemoteRegions> remote,
                                               const Config& config);
  Courier(const Courier&) = delete;
  Courier& operator=(const Courier&) = delete;

  // Whether `dst` is out of reach.
  bool Serves(int32_t dst) const { return outboxes_[dst].front != nullptr; }
  // The memory that kernels take for the region of `dst`. Null for a rank within reach.
  std::byte* OutboxOf(int32_t dst) const { return outboxes_[dst].front; }

  // Sends bytes of a packed message, and the signal behind them.
  void Send(const RankView& view, const CopyOrder& order);
  // Sends the notices and acknowledgements that are new in the outboxes. Returns whether there were
  // any.
  bool Forward(const RankView& view);

 private:
  struct Outbox {
    std::byte* front = nullptr;
    std::array<uint64_t, kMaxSlots> acks{};  // the last that Forward has sent, by slot
  };

  Courier(std::unique_ptr<RemoteRegions> remote, int32_t ep_size);
  std::optional<Fault> MakeOutboxes(const RegionLayout& regions);
  bool ForwardNotice(const RankView& view, int32_t message, int32_t slot);
  bool ForwardAck(const RankView& view, int32_t dst, int32_t slot);

  const std::unique_ptr<RemoteRegions> remote_;
  std::vector<Outbox> outboxes_;  // by rank
  // The last notices that Forward has sent, by message and slot.
  std::array<std::array<uint64_t, kMaxSlots>, kMaxMessages> noticed_{};
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_HOST_COURIER_H_
