// Calls back when a wait has lasted too long.

#ifndef JAX_SM_FREE_CC_CPU_WATCHDOG_H_
#define JAX_SM_FREE_CC_CPU_WATCHDOG_H_

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <utility>

namespace jax_sm_free {

// One thread for all timers of the process. Thread-safe.
class Watchdog {
 public:
  using Clock = std::chrono::steady_clock;
  using Timer = std::pair<Clock::time_point, int64_t>;

  // The process's watchdog; never destroyed, like the worker pool.
  static Watchdog& Get();

  // `expire` runs on the thread of the watchdog. It must be short and must not block.
  Timer Start(std::chrono::duration<double> delay, std::function<void()> expire);

  // `expire` is not called afterwards. A call that has begun may still run.
  void Cancel(const Timer& timer);

 private:
  Watchdog();
  void Watch();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<Timer, std::function<void()>> timers_;
  int64_t next_id_ = 0;
  // When the thread looks at the timers next. Most timers are cancelled long before they expire. A
  // thread that sleeps until the time of a cancelled timer need not be woken for a later timer.
  Clock::time_point next_look_ = Clock::time_point::min();
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_WATCHDOG_H_
