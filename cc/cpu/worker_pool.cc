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
  const std::lock_guard lock(mutex_);
  tasks_.push_back(std::move(task));
  CallThreads();
}

// As many as there are tasks, with those that are on their way.
void WorkerPool::CallThreads() {
  const int64_t wanted = std::min(static_cast<int64_t>(tasks_.size()), most_coming_);
  for (; num_coming_ < wanted; ++num_coming_) {
    if (num_called_ < num_idle_) {
      ++num_called_;
      is_called_.notify_one();
    } else {
      std::thread([this] { Work(); }).detach();
    }
  }
}

void WorkerPool::Work() {
  std::unique_lock lock(mutex_);
  while (true) {
    --num_coming_;
    while (!tasks_.empty()) {
      std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      CallThreads();
      lock.unlock();
      task();
      task = nullptr;  // what it holds is given back before the thread takes another
      lock.lock();
    }
    ++num_idle_;
    is_called_.wait(lock, [this] { return num_called_ > 0; });
    --num_called_;
    --num_idle_;
  }
}

}  // namespace jax_sm_free
