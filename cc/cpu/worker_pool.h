// Threads that finish what arrived.

#ifndef JAX_SM_FREE_CC_CPU_WORKER_POOL_H_
#define JAX_SM_FREE_CC_CPU_WORKER_POOL_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>

namespace jax_sm_free {

// Runs tasks on idle threads, and on new ones where none is idle. A pool of fixed size would
// deadlock: fulfilling a receive's promise runs the rest of that device's program on the same
// thread, and that program may block until tasks still queued here have run. There are at most as
// many threads as receives that were in flight at once.
//
// A thread that has run a task takes the next one. To wake a thread for each task costs more than
// many a task itself, where cores are few: the task is done by a thread that was awake before the
// new one gets a core. So only as many threads are on their way as half of the cores could take,
// and each that comes and leaves tasks behind wakes the next. While a task waits, a thread is on
// its way to it: it gets a core at the latest when those that run tasks block.
class WorkerPool {
 public:
  // The process's pool. It is never destroyed, because a program may outlive static destructors.
  static WorkerPool& Get();

  // A pool of its own, which is never destroyed either: of which `most_coming` threads at most are
  // on their way at once.
  explicit WorkerPool(int64_t most_coming) : most_coming_(most_coming) {}

  void Run(std::function<void()> task);

 private:
  void Work();
  void CallThreads(std::unique_lock<std::mutex> lock);

  const int64_t most_coming_;
  std::mutex mutex_;
  std::condition_variable is_called_;
  std::deque<std::function<void()>> tasks_;
  int64_t num_idle_ = 0;    // threads that wait to be called
  int64_t num_called_ = 0;  // of those that wait
  int64_t num_coming_ = 0;  // on their way: these, and new threads
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_WORKER_POOL_H_
