#include "cc/cpu/worker_pool.h"

#include <algorithm>
#include <thread>
#include <utility>

namespace jax_sm_free {

WorkerPool& WorkerPool::Get() {
  static auto* pool = new WorkerPool(std::max<int64_t>(1, std::thread::hardware_concurrency() / 2));
  return *pool;
}

void WorkerPool::Run(std::function<void()> task) {
  std::unique_lock lock(mutex_);
  tasks_.push_back(std::move(task));
  CallThreads(std::move(lock));
}

// Calls threads until there are as many as tasks, including those that are coming. They are called
// after the lock is released, because they need it first of all.
void WorkerPool::CallThreads(std::unique_lock<std::mutex> lock) {
  const int64_t wanted = std::min(static_cast<int64_t>(tasks_.size()), most_coming_);
  const int64_t num_new = std::max<int64_t>(wanted - num_coming_, 0);
  const int64_t num_called = std::min(num_new, num_idle_ - num_called_);
  num_coming_ += num_new;
  num_called_ += num_called;
  lock.unlock();
  for (int64_t i = 0; i < num_called; ++i) is_called_.notify_one();
  for (int64_t i = num_called; i < num_new; ++i) std::thread([this] { Work(); }).detach();
}

void WorkerPool::Work() {
  std::unique_lock lock(mutex_);
  while (true) {
    --num_coming_;
    while (!tasks_.empty()) {
      std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      CallThreads(std::move(lock));
      task();
      task = nullptr;  // frees what the task holds before the thread takes another task
      lock = std::unique_lock(mutex_);
    }
    ++num_idle_;
    is_called_.wait(lock, [this] { return num_called_ > 0; });
    --num_called_;
    --num_idle_;
  }
}

}  // namespace jax_sm_free
