// Moves packed messages to other GPUs with copy engines: no SM is involved.

#ifndef JAX_SM_FREE_CC_CUDA_MOVER_H_
#define JAX_SM_FREE_CC_CUDA_MOVER_H_

#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cc/cuda/device_state.h"

namespace jax_sm_free::cuda {

// The host thread of one GPU. Kernels post entries to its mailbox in pinned memory; for each it
// enqueues a copy of exactly the message's bytes on the stream of that destination, and behind it a
// write of the sequence number to the destination's signal. Nothing it enqueues ever waits.
class Mover {
 public:
  Mover(int device, const RankView& view);
  ~Mover();
  Mover(const Mover&) = delete;
  Mover& operator=(const Mover&) = delete;

  // Called when an exchange was enqueued: entries will come soon.
  void Wake();

  // The first error of a copy, empty if there was none. It stays.
  std::string Error();

 private:
  using Clock = std::chrono::steady_clock;

  void Run();
  bool TakeEntry(MailboxEntry& entry);
  cudaError_t Issue(const MailboxEntry& entry);

  const int device_;
  const RankView view_;
  std::vector<cudaStream_t> streams_;  // by destination
  uint64_t next_tag_ = 1;
  std::mutex mutex_;
  std::condition_variable woken_;
  std::atomic<Clock::rep> last_active_{0};
  std::atomic<bool> stop_{false};
  std::string error_;  // guarded by mutex_
  std::thread thread_;
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_MOVER_H_
