// Threads that finish what arrived.

#ifndef JAX_SM_FREE_CC_CPU_WORKER_POOL_H_
#define JAX_SM_FREE_CC_CPU_WORKER_POOL_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>

namespace jax_sm_free {

// Runs each task at once: on an idle thread, or on a new one where none is idle. A pool of fixed
// size would deadlock: fulfilling a receive's promise runs the rest of that device's program on the
// same thread, and that program may block until tasks still queued here have run. There are at most
// as many threads as receives that were in flight at once.
class WorkerPool {
 public:
  // The process's pool. It is never destroyed, because a program may outlive static destructors.
  static WorkerPool& Get();

  void Run(std::function<void()> task);

 private:
  void Work();

  std::mutex mutex_;
  std::condition_variable has_task_;
  std::deque<std::function<void()>> tasks_;
  int64_t num_idle_ = 0;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_WORKER_POOL_H_
