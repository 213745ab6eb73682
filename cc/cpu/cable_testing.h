// Wires between the "processes" of a test, which are threads of one process.

#ifndef JAX_SM_FREE_CC_CPU_CABLE_TESTING_H_
#define JAX_SM_FREE_CC_CPU_CABLE_TESTING_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cc/cpu/wire.h"
#include "gtest/gtest.h"

namespace jax_sm_free::testing {

// Threads hand over the messages.
class Cable {
 public:
  class End : public Wire {
   public:
    End(Cable& cable, int32_t self, Callbacks callbacks)
        : cable_(cable), self_(self), callbacks_(std::move(callbacks)) {
      thread_ = std::thread([this] { Deliver(); });
    }
    ~End() override { Close(); }
    const std::string& address() const override { return address_; }
    void Connect(std::vector<std::string> /*addresses*/) override {}
    std::vector<Unreached> AwaitPeers(std::chrono::duration<double> /*patience*/) override {
      return {};
    }
    void Send(int32_t peer, Header header, std::span<const std::byte> payload,
              OnSent on_sent) override {
      if (peer == muted_for_) return on_sent();
      End* end = cable_.ends[peer];
      std::vector<std::byte> head(header.begin(), header.end());
      std::vector<std::byte> body(payload.begin(), payload.end());
      end->Put([end, from = self_, head = std::move(head), body = std::move(body)] {
        const auto bytes = static_cast<int64_t>(body.size());
        BlockPool::Block block;
        if (bytes > 0) {
          block = end->callbacks_.allocate(from, head, bytes);
          ASSERT_NE(block, nullptr);
          std::memcpy(block.get(), body.data(), body.size());
        }
        end->callbacks_.on_message(from, head, std::move(block), bytes);
      });
      on_sent();
    }
    // Messages that are sent to `peer` get lost.
    void MuteFor(int32_t peer) { muted_for_ = peer; }
    void Lose(int32_t peer) {
      Put([this, peer] { callbacks_.on_lost(peer, "it was cut"); });
    }
    void Close() override {
      if (!thread_.joinable()) return;
      Put(nullptr);
      thread_.join();
    }

   private:
    void Put(std::function<void()> task) {
      const std::lock_guard lock(mutex_);
      tasks_.push_back(std::move(task));
      changed_.notify_one();
    }
    void Deliver() {
      while (true) {
        std::function<void()> task;
        {
          std::unique_lock lock(mutex_);
          changed_.wait(lock, [this] { return !tasks_.empty(); });
          task = std::move(tasks_.front());
          tasks_.pop_front();
        }
        if (!task) return;
        task();
      }
    }

    Cable& cable_;
    const int32_t self_;
    const std::string address_;
    const Callbacks callbacks_;
    std::atomic<int32_t> muted_for_ = -1;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::function<void()>> tasks_;
    std::thread thread_;
  };

  std::vector<End*> ends;
};

}  // namespace jax_sm_free::testing

#endif  // JAX_SM_FREE_CC_CPU_CABLE_TESTING_H_
