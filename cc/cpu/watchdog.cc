#include "cc/cpu/watchdog.h"

#include <thread>

namespace jax_sm_free {

Watchdog& Watchdog::Get() {
  static auto* watchdog = new Watchdog;
  return *watchdog;
}

Watchdog::Watchdog() {
  std::thread([this] { Watch(); }).detach();
}

Watchdog::Timer Watchdog::Start(std::chrono::duration<double> delay, std::function<void()> expire) {
  const std::lock_guard lock(mutex_);
  const Timer timer{Clock::now() + std::chrono::duration_cast<Clock::duration>(delay), next_id_++};
  timers_[timer] = std::move(expire);
  if (timer.first < next_look_) changed_.notify_one();
  return timer;
}

void Watchdog::Cancel(const Timer& timer) {
  const std::lock_guard lock(mutex_);
  timers_.erase(timer);
}

void Watchdog::Watch() {
  std::unique_lock lock(mutex_);
  while (true) {
    if (timers_.empty()) {
      next_look_ = Clock::time_point::max();
      changed_.wait(lock);
      continue;
    }
    const auto first = timers_.begin();
    const Clock::time_point when = first->first.first;
    if (when > Clock::now()) {
      next_look_ = when;
      changed_.wait_until(lock, when);
      continue;
    }
    next_look_ = Clock::time_point::min();
    const std::function<void()> expire = std::move(first->second);
    timers_.erase(first);
    lock.unlock();
    expire();
    lock.lock();
  }
}

}  // namespace jax_sm_free
