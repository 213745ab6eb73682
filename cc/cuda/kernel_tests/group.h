// The ranks of a group as kernels see them, all in one memory, and a mover for all of them.

#ifndef JAX_SM_FREE_CC_CUDA_KERNEL_TESTS_GROUP_H_
#define JAX_SM_FREE_CC_CUDA_KERNEL_TESTS_GROUP_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cc/config.h"
#include "cc/cuda/device_state.h"
#include "cc/cuda/kernel_tests/memory.h"
#include "cc/cuda/rank_view.h"

namespace jax_sm_free::cuda::kernel_tests {

class Group {
 public:
  explicit Group(const Config& config);

  const RankView& view(int32_t rank) const { return ranks_[rank]->view; }
  const FaultRecord& fault(int32_t rank) const { return ranks_[rank]->status[0].fault; }
  const Counters& counters(int32_t rank) const { return ranks_[rank]->state[0].counters; }

  // Copies everything that was posted since the last call, as the movers do. The kernels must have
  // ended.
  void Move();
  // The same for a driver that holds up all copies: no message arrives.
  void HoldUp();

  // The number of messages that were copied completely, and the number of first parts that were
  // copied.
  int64_t num_last_parts() const { return num_last_parts_; }
  int64_t num_first_parts() const { return num_first_parts_; }

 private:
  struct Rank {
    RankView view{};
    Array<DeviceState> state{1};
    Array<Status> status{1};
    Array<std::byte> region;
    Array<MailboxEntry> mailbox;
    uint64_t num_taken = 0;
    Array<int32_t> own_token;
    Array<int32_t> row_of;
    Array<int32_t> tile_counts;
    Array<int32_t> common_before;
    Array<int64_t> group_row;
    Array<int64_t> group_end;
    Array<int64_t> group_next;
    Array<uint8_t> covered;
  };

  static std::unique_ptr<Rank> MakeRank(const Config& config, int32_t number);
  // The orders that a rank has posted since the last call.
  static std::vector<CopyOrder> TakeOrders(Rank& rank);
  void Copy(const RankView& view, const CopyOrder& order);

  std::vector<std::unique_ptr<Rank>> ranks_;
  int64_t num_last_parts_ = 0;
  int64_t num_first_parts_ = 0;
};

}  // namespace jax_sm_free::cuda::kernel_tests

#endif  // JAX_SM_FREE_CC_CUDA_KERNEL_TESTS_GROUP_H_
