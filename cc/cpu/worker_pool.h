// Threads that finish recvs whose messages have arrived.

#ifndef JAX_SM_FREE_CC_CPU_WORKER_POOL_H_
#define JAX_SM_FREE_CC_CPU_WORKER_POOL_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>

namespace jax_sm_free {

// Runs tasks on idle threads, and on new threads if none is idle. A pool of fixed size would
// deadlock: to fulfil the promise of a recv runs the rest of that device's program on the same
// thread, and that program may block until tasks that are still queued here have run. There are at
// most as many threads as recvs that were in flight at once.
//
// A thread that has run a task takes the next one. Where cores are few, waking a thread for each
// task costs more than many tasks do: before the new thread gets a core, a thread that is awake has
// done the task. So the number of threads that are coming is limited to half of the number of
// cores. Each thread that comes and leaves tasks in the queue wakes the next one. While a task
// waits, a thread is coming for it: that thread gets a core at the latest when the threads that run
// tasks block.
class WorkerPool {
 public:
  // The process's pool. It is never destroyed, because a program may outlive static destructors.
  static WorkerPool& Get();

  // A pool of its own, which is never destroyed either. At most `most_coming` threads are coming at
  // once.
  explicit WorkerPool(int64_t most_coming) : most_coming_(most_coming) {}

  void Run(std::function<void()> task);

 private:
  void Work();
  void CallThreads(std::unique_lock<std::mutex> lock);

  const int64_t most_coming_;
  std::mutex mutex_;
  std::condition_variable is_called_;
  std::deque<std::function<void()>> tasks_;
  int64_t num_idle_ = 0;    // threads that wait for a call
  int64_t num_called_ = 0;  // threads that wait and were called
  int64_t num_coming_ = 0;  // called threads and new threads, until they are here
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_WORKER_POOL_H_
