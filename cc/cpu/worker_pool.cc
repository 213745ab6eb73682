#include "cc/cpu/worker_pool.h"

#include <thread>
#include <utility>

namespace jax_sm_free {

WorkerPool& WorkerPool::Get() {
  static auto* pool = new WorkerPool;
  return *pool;
}

void WorkerPool::Run(std::function<void()> task) {
  const std::lock_guard lock(mutex_);
  tasks_.push_back(std::move(task));
  if (static_cast<int64_t>(tasks_.size()) > num_idle_) {
    std::thread([this] { Work(); }).detach();
    ++num_idle_;  // counted here, so that two tasks never count on the same new thread
  }
  has_task_.notify_one();
}

void WorkerPool::Work() {
  std::unique_lock lock(mutex_);
  while (true) {
    has_task_.wait(lock, [this] { return !tasks_.empty(); });
    std::function<void()> task = std::move(tasks_.front());
    tasks_.pop_front();
    --num_idle_;
    lock.unlock();
    task();
    task = nullptr;  // what it holds is given back before the thread counts as idle
    lock.lock();
    ++num_idle_;
  }
}

}  // namespace jax_sm_free
