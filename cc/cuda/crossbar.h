// Who may send to whom right now, among the GPUs of a group.

#ifndef JAX_SM_FREE_CC_CUDA_CROSSBAR_H_
#define JAX_SM_FREE_CC_CUDA_CROSSBAR_H_

#include <array>
#include <atomic>
#include <cstdint>

#include "cc/cuda/device_state.h"

namespace jax_sm_free::cuda {

// Two copies into one GPU share its link while another GPU's link idles, and once ranks are out of
// step nothing brings them back. So a copy starts when no other one is on its way to its
// destination. Called by the movers of all ranks of the group.
class Crossbar {
 public:
  // Takes the link into `dst`. False while another rank has it.
  bool TryTake(int32_t dst) {
    return !taken_[dst].load(std::memory_order_relaxed) &&
           !taken_[dst].exchange(true, std::memory_order_acquire);
  }
  void Release(int32_t dst) { taken_[dst].store(false, std::memory_order_release); }

 private:
  struct alignas(64) Link : std::atomic<bool> {};  // a cache line each
  std::array<Link, kMaxRanks> taken_{};
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_CROSSBAR_H_
