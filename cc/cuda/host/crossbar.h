// Says which GPU of a group may send to which one right now.

#ifndef JAX_SM_FREE_CC_CUDA_HOST_CROSSBAR_H_
#define JAX_SM_FREE_CC_CUDA_HOST_CROSSBAR_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <utility>

#include "cc/cuda/device_state.h"

namespace jax_sm_free::cuda {

// The links into the GPUs of the ranks: the time at which each was taken, 0 if it is free. All
// zeros at first. Lies in the memory of one process, or in memory that several processes share.
struct Links {
  struct alignas(64) Link : std::atomic<int64_t> {};  // One cache line each.
  static_assert(Link::is_always_lock_free);           // so that processes can share it
  Link taken[kMaxRanks];
};

// Two copies into one GPU share its link while another GPU's link idles, and once ranks are out of
// step nothing brings them back. So a copy starts only when no other copy is on its way to the same
// destination. The movers of all ranks of the group call this. Only speed depends on it: a rank
// that holds a link for longer than any copy takes has died, or sleeps, and loses the link.
class Crossbar {
 public:
  using Ticket = int64_t;
  static constexpr std::chrono::nanoseconds kLost = std::chrono::milliseconds(200);

  explicit Crossbar(std::shared_ptr<Links> links = std::make_shared<Links>())
      : links_(std::move(links)) {}

  // Takes the link into `dst`. Returns 0 while another rank has the link.
  Ticket TryTake(int32_t dst) {
    Links::Link& link = links_->taken[dst];
    int64_t since = link.load(std::memory_order_relaxed);
    const Ticket now = Clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
    if (since != 0 && now - since < kLost.count()) return 0;
    return link.compare_exchange_strong(since, now, std::memory_order_acquire) ? now : 0;
  }
  // Gives the link back, unless this rank has lost it meanwhile.
  void Release(int32_t dst, Ticket ticket) {
    links_->taken[dst].compare_exchange_strong(ticket, 0, std::memory_order_release);
  }

 private:
  using Clock = std::chrono::steady_clock;  // the same in all processes of a host
  std::shared_ptr<Links> links_;
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_HOST_CROSSBAR_H_
