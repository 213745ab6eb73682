// Moves packed messages to other GPUs with copy engines: no SM is involved.

#ifndef JAX_SM_FREE_CC_CUDA_HOST_MOVER_H_
#define JAX_SM_FREE_CC_CUDA_HOST_MOVER_H_

#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "cc/cuda/device_state.h"
#include "cc/cuda/host/courier.h"
#include "cc/cuda/host/crossbar.h"
#include "cc/cuda/host/group_end.h"
#include "cc/cuda/rank_view.h"
#include "cc/fault.h"

namespace jax_sm_free::cuda {

// The host thread of one GPU. Kernels post orders to the mailbox in pinned memory. For each order
// the mover enqueues a copy of exactly the message's bytes on the stream of that destination, and
// behind the copy a write to the destination's signal. Nothing that the mover enqueues ever waits.
//
//   mailbox ---> waiting ---------------> on its way -----------------------> done
//                         the crossbar                 shortly before the end
//                         gives the link               the link goes back
//
// Copy engines serve one peer after the other, so a rank has one copy on its way at a time. All
// ranks post to their peers in the order of the ring, and movers keep this order. A mover that took
// the next free link instead would leave two ranks with the same last destination.
//
// The mover gives a link back a little before the copy ends, because the host needs some time to
// enqueue the next copy. It computes that moment from the time that the link needs for a byte,
// which it measures when the buffer is made.
class Mover {
 public:
  // The group shares `crossbar`. `courier`, if any, takes the orders for ranks out of reach.
  // `group_end`, if any, hears of this rank's fault, and ends this rank's waits when the group has
  // ended. `done` u64 [ep_size] is zeros in pinned memory that this mover alone uses.
  //
  // Measures the links to the peers, whose regions exist and hold no messages yet. A group of one
  // rank has a mover, too, which tells its faults and moves nothing.
  Mover(int device, const RankView& view, std::shared_ptr<Crossbar> crossbar,
        std::shared_ptr<Courier> courier, std::shared_ptr<GroupEnd> group_end, uint64_t* done);
  ~Mover();
  Mover(const Mover&) = delete;
  Mover& operator=(const Mover&) = delete;

  // Called when an exchange was enqueued, because orders will come soon.
  void Wake();

  // The fault of the first copy that failed, if one has failed. It stays.
  std::optional<Fault> CopyFault();

 private:
  using Clock = std::chrono::steady_clock;

  // A copy that was enqueued.
  struct Copy {
    int32_t dst = -1;
    Crossbar::Ticket ticket = 0;
    uint64_t number = 0;
    Clock::duration length{};  // that it should take
    Clock::time_point end{};   // when it should have moved its bytes
  };

  int32_t DestinationOf(const CopyOrder& order) const {
    return view_.messages.end[order.message].rank;
  }
  bool IsForCourier(int32_t dst) const { return courier_ != nullptr && courier_->Serves(dst); }
  cudaError_t Prepare();
  cudaError_t MeasureLink(int32_t dst);
  void ReleaseLink();
  void Run();
  // TakeOrder, FinishCopy and StartCopy return whether they found anything to do.
  bool TakeOrder();
  void Accept(const CopyOrder& order);
  bool FinishCopy();
  bool StartCopy();
  bool IsDone(const Copy& copy) const;
  void TellSlowWait();
  void TellFault();
  void HearOfEnd();
  cudaError_t Issue(const CopyOrder& order, uint64_t number);
  void Fail(cudaError_t status);

  const int device_;
  const RankView view_;
  const std::shared_ptr<Crossbar> crossbar_;
  const std::shared_ptr<Courier> courier_;
  const std::shared_ptr<GroupEnd> group_end_;
  uint64_t* const done_;  // by destination: the number of the last copy that has arrived
  std::vector<cudaStream_t> streams_;     // by destination; null if nothing goes there
  std::vector<double> seconds_per_byte_;  // by destination
  std::deque<CopyOrder> waiting_;
  Copy on_its_way_;
  Copy before_;              // the copy before, which may still move its last bytes
  uint64_t num_orders_ = 0;  // taken from the mailbox
  std::mutex mutex_;
  std::condition_variable woken_;
  std::atomic<Clock::rep> last_active_{0};
  std::atomic<bool> stop_{false};
  bool failed_ = false;
  bool has_seen_fault_ = false;      // of a kernel
  std::optional<Fault> copy_fault_;  // guarded by mutex_
  std::thread thread_;
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_HOST_MOVER_H_
