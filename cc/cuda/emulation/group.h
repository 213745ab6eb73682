// The ranks of a group as kernels see them, in the host's memory, and a mover for all of them.

#ifndef JAX_SM_FREE_CC_CUDA_EMULATION_GROUP_H_
#define JAX_SM_FREE_CC_CUDA_EMULATION_GROUP_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cc/config.h"
#include "cc/cuda/device_state.h"

namespace jax_sm_free::cuda::emulation {

class Group {
 public:
  explicit Group(const Config& config);

  const RankView& view(int32_t rank) const { return ranks_[rank]->view; }
  const FaultRecord& fault(int32_t rank) const { return ranks_[rank]->status.fault; }

  // Copies what was posted since the last call, as the movers do.
  void Move();
  // The same where the driver holds all copies up: none of them comes.
  void HoldUp();

  // Messages that came whole, or the last part of which came; and first parts.
  int64_t num_last_parts() const { return num_last_parts_; }
  int64_t num_first_parts() const { return num_first_parts_; }

 private:
  struct Rank {
    RankView view{};
    DeviceState state{};
    Status status{};
    std::vector<std::byte> region;
    std::vector<MailboxEntry> mailbox;
    uint64_t num_taken = 0;
    std::vector<int32_t> own_token;
    std::vector<int32_t> row_of;
    std::vector<int32_t> tile_counts;
    std::vector<int64_t> group_row;
    std::vector<int64_t> group_end;
    std::vector<int64_t> group_next;
    std::vector<uint8_t> covered;
  };

  static std::unique_ptr<Rank> MakeRank(const Config& config, int32_t number);
  // The orders that a rank has posted since the last call.
  static std::vector<CopyOrder> TakeOrders(Rank& rank);
  void Copy(const RankView& view, const CopyOrder& order);

  std::vector<std::unique_ptr<Rank>> ranks_;
  int64_t num_last_parts_ = 0;
  int64_t num_first_parts_ = 0;
};

}  // namespace jax_sm_free::cuda::emulation

#endif  // JAX_SM_FREE_CC_CUDA_EMULATION_GROUP_H_
