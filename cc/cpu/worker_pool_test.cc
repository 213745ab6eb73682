#include "cc/cpu/worker_pool.h"

#include <atomic>
#include <chrono>
#include <cstddef>
#include <future>
#include <latch>
#include <memory>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

TEST(WorkerPoolTest, RunsATaskOnAnotherThread) {
  std::promise<std::thread::id> ran;
  WorkerPool::Get().Run([&ran] { ran.set_value(std::this_thread::get_id()); });
  EXPECT_NE(ran.get_future().get(), std::this_thread::get_id());
}

TEST(WorkerPoolTest, TasksThatWaitForEachOtherAllRun) {
  constexpr int kTasks = 40;
  std::latch all_run(kTasks);
  std::latch all_done(kTasks);
  for (int i = 0; i < kTasks; ++i) {
    WorkerPool::Get().Run([&] {
      all_run.arrive_and_wait();
      all_done.count_down();
    });
  }
  all_done.wait();
}

TEST(WorkerPoolTest, TasksThatWaitForEachOtherAllRunWhereOneThreadComesAtATime) {
  constexpr int kTasks = 40;
  static auto* pool = new WorkerPool(1);
  for (int round = 0; round < 3; ++round) {  // first with new threads, then with idle threads
    std::latch all_run(kTasks);
    std::latch all_done(kTasks);
    for (int i = 0; i < kTasks; ++i) {
      pool->Run([&] {
        all_run.arrive_and_wait();
        all_done.count_down();
      });
    }
    all_done.wait();
  }
}

TEST(WorkerPoolTest, BlockedTasksDoNotStarveLaterOnes) {
  std::promise<void> release;
  const std::shared_future<void> released = release.get_future().share();
  constexpr int kBlocked = 20;
  std::latch blocked_done(kBlocked);
  for (int i = 0; i < kBlocked; ++i) {
    WorkerPool::Get().Run([&blocked_done, released] {
      released.wait();
      blocked_done.count_down();
    });
  }
  for (int i = 0; i < 100; ++i) {
    std::promise<void> ran;
    WorkerPool::Get().Run([&ran] { ran.set_value(); });
    ran.get_future().wait();
  }
  release.set_value();
  blocked_done.wait();
}

TEST(WorkerPoolTest, ATaskMayWaitForTasksItStarts) {
  std::promise<void> done;
  WorkerPool::Get().Run([&done] {
    std::latch children(5);
    for (int i = 0; i < 5; ++i) WorkerPool::Get().Run([&children] { children.count_down(); });
    children.wait();
    done.set_value();
  });
  done.get_future().wait();
}

TEST(WorkerPoolTest, IdleThreadsAreUsedAgain) {
  constexpr int kTasks = 200;
  std::set<std::thread::id> threads;
  for (int i = 0; i < kTasks; ++i) {
    std::promise<std::thread::id> ran;
    WorkerPool::Get().Run([&ran] { ran.set_value(std::this_thread::get_id()); });
    threads.insert(ran.get_future().get());
  }
  // A thread becomes idle shortly after its task, so the next task may get another thread.
  EXPECT_LT(threads.size(), static_cast<size_t>(kTasks / 2));
}

TEST(WorkerPoolTest, WhatATaskHoldsIsGivenBackWhenItHasRun) {
  auto held = std::make_shared<int>(1);
  const std::weak_ptr<int> weak = held;
  WorkerPool::Get().Run([held = std::move(held)] {});
  while (!weak.expired()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

TEST(WorkerPoolTest, ThreadsMayStartTasksAtOnce) {
  constexpr int kThreads = 4;
  constexpr int kTasks = 200;
  std::atomic<int> sum = 0;
  std::latch all_run(std::ptrdiff_t{kThreads} * kTasks);
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < kTasks; ++i) {
        WorkerPool::Get().Run([&] {
          ++sum;
          all_run.count_down();
        });
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  all_run.wait();
  EXPECT_EQ(sum, kThreads * kTasks);
}

}  // namespace
}  // namespace jax_sm_free
