#include "cc/cpu/shared_wire.h"

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cc/cpu/ucx_testing.h"
#include "cc/cpu/ucx_wire.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::UcxLibraryPath;

// A user of the shared wire, and what came to it.
class User {
 public:
  User(SharedWire& shared, int64_t number) {
    Wire::Callbacks callbacks;
    callbacks.wants = {};
    callbacks.allocate = [this](int32_t, Wire::Header, int64_t bytes) -> BlockPool::Block {
      return bytes > kMaxBytes ? BlockPool::Block() : pool_.Take();
    };
    callbacks.on_message = [this](int32_t, Wire::Header header, BlockPool::Block, int64_t bytes) {
      Add(std::string(reinterpret_cast<const char*>(header.data()), header.size()) + " " +
          std::to_string(bytes));
    };
    callbacks.on_lost = [this](int32_t peer, const std::string& reason) {
      Add("lost " + std::to_string(peer) + ": " + reason);
    };
    wire_ = shared.Attach(number, std::move(callbacks));
  }

  Wire& wire() { return *wire_; }

  void Send(int32_t peer, const std::string& text, int64_t bytes = 0) {
    auto payload = std::make_shared<std::vector<std::byte>>(bytes);
    wire_->Send(peer, std::as_bytes(std::span(text)), *payload, [payload] {});
  }

  // The next message or loss, as text. Empty if there is none.
  std::string Next(std::chrono::duration<double> patience = seconds(100)) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, patience, [this] { return !seen_.empty(); });
    if (seen_.empty()) return {};
    std::string next = seen_.front();
    seen_.erase(seen_.begin());
    return next;
  }

  static constexpr int64_t kMaxBytes = 1 << 20;

 private:
  void Add(std::string what) {
    const std::lock_guard lock(mutex_);
    seen_.push_back(std::move(what));
    changed_.notify_all();
  }

  BlockPool pool_{kMaxBytes};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::string> seen_;
  std::unique_ptr<Wire> wire_;
};

std::shared_ptr<SharedWire> Open(int32_t self, int64_t id = 3) {
  auto shared = SharedWire::Open(
      id, self, 2, [self](Wire::Callbacks callbacks) -> Result<std::unique_ptr<Wire>> {
        auto wire = UcxWire::Open({.library = UcxLibraryPath(), .self = self, .num_peers = 2},
                                  std::move(callbacks));
        if (const Fault* fault = FaultOf(wire)) return *fault;
        return std::unique_ptr<Wire>(std::move(std::get<0>(wire)));
      });
  return std::get<0>(shared);
}

// Two processes. Each of them has two users that share a wire.
class SharedWireTest : public ::testing::Test {
 protected:
  void SetUp() override {
    SMF_NEED_UCX();
    for (const int32_t self : {0, 1}) {
      shared_.push_back(Open(self));
      for (const int64_t number : {7, 8}) {
        users_[self].push_back(std::make_unique<User>(*shared_[self], number));
      }
    }
    const std::vector<std::string> addresses{users_[0][0]->wire().address(),
                                             users_[1][0]->wire().address()};
    for (const int32_t self : {0, 1}) {
      for (const auto& user : users_[self]) user->wire().Connect(addresses);
    }
    for (const int32_t self : {0, 1}) {
      for (const auto& user : users_[self]) {
        ASSERT_TRUE(user->wire().AwaitPeers(seconds(100)).empty());
      }
    }
  }

  std::vector<std::shared_ptr<SharedWire>> shared_;
  std::vector<std::unique_ptr<User>> users_[2];
};

TEST_F(SharedWireTest, EachGetsItsOwnMessagesInOrder) {
  for (int i = 0; i < 50; ++i) {
    const int64_t bytes = i % 3 == 0 ? User::kMaxBytes : i;
    users_[0][0]->Send(1, "a" + std::to_string(i), bytes);
    users_[0][1]->Send(1, "b" + std::to_string(i), bytes);
  }
  for (int i = 0; i < 50; ++i) {
    const std::string bytes = std::to_string(i % 3 == 0 ? User::kMaxBytes : i);
    EXPECT_EQ(users_[1][0]->Next(), "a" + std::to_string(i) + " " + bytes);
    EXPECT_EQ(users_[1][1]->Next(), "b" + std::to_string(i) + " " + bytes);
  }
}

TEST_F(SharedWireTest, OneThatClosesIsGoneForItsPeerAlone) {
  users_[0][0]->Send(1, "last", User::kMaxBytes);
  users_[0][0]->wire().Close();
  EXPECT_EQ(users_[1][0]->Next(), "last 1048576");
  EXPECT_EQ(users_[1][0]->Next(), "lost 0: it closed its end");
  users_[0][1]->Send(1, "still here");
  EXPECT_EQ(users_[1][1]->Next(), "still here 0");
  users_[1][1]->Send(0, "and back", 5);
  EXPECT_EQ(users_[0][1]->Next(), "and back 5");
  for (const auto& shared : shared_) EXPECT_TRUE(shared->IsSound());
}

TEST_F(SharedWireTest, WhatComesToOneThatHasClosedIsDropped) {
  users_[1][0]->wire().Close();
  for (const int64_t bytes : {int64_t{0}, int64_t{10}, User::kMaxBytes, 2 * User::kMaxBytes}) {
    users_[0][0]->Send(1, "too late", bytes);
  }
  users_[0][1]->Send(1, "in time", 10);
  EXPECT_EQ(users_[1][1]->Next(), "in time 10");
  EXPECT_EQ(users_[1][0]->Next(milliseconds(0)), "");
}

TEST_F(SharedWireTest, ClosingAgainAndSendingAfterwardsDoNothing) {
  users_[0][0]->wire().Close();
  users_[0][0]->wire().Close();
  bool sent = false;
  users_[0][0]->wire().Send(1, {}, {}, [&sent] { sent = true; });
  EXPECT_TRUE(sent);
}

TEST_F(SharedWireTest, TheLastThatClosesTakesTheWireAlong) {
  shared_[0] = nullptr;
  for (const auto& user : users_[0]) user->wire().Close();
  for (const auto& user : users_[1]) EXPECT_EQ(user->Next(), "lost 0: it closed its end");
  while (shared_[1]->IsSound()) std::this_thread::sleep_for(milliseconds(5));
  User late(*shared_[1], 9);
  const std::vector<Wire::Unreached> unreached = late.wire().AwaitPeers(seconds(100));
  ASSERT_EQ(unreached.size(), 1U);
  EXPECT_EQ(unreached[0].peer, 0);
  EXPECT_EQ(unreached[0].reason, "it closed its end");
}

TEST_F(SharedWireTest, AMessageThatHasNoPlaceLosesItsSenderForAll) {
  users_[0][0]->Send(1, "too large", 2 * User::kMaxBytes);
  for (const auto& user : users_[1]) {
    EXPECT_EQ(user->Next(), "lost 0: it sent 2097152 bytes that have no place here");
  }
}

TEST_F(SharedWireTest, TheNewestSoundOneIsFound) {
  SharedWires wires;
  EXPECT_EQ(wires.Find("0,1"), nullptr);
  wires.Add("0,1", shared_[0]);
  EXPECT_EQ(wires.Find("0,1"), shared_[0]);
  EXPECT_EQ(wires.Find("0,2"), nullptr);
  wires.Add("0,1", Open(0, /*id=*/4));  // not connected, and destroyed at once
  EXPECT_EQ(wires.Find("0,1"), shared_[0]);
  const std::shared_ptr<SharedWire> idle = Open(0, /*id=*/5);
  wires.Add("0,1", idle);
  EXPECT_EQ(wires.Find("0,1"), shared_[0]);
  users_[1].clear();
  shared_[1] = nullptr;
  while (shared_[0]->IsSound()) std::this_thread::sleep_for(milliseconds(5));
  EXPECT_EQ(wires.Find("0,1"), nullptr);
}

TEST(SharedWireOpenTest, AFaultIsHandedOn) {
  const auto shared = SharedWire::Open(0, 0, 1, [](const Wire::Callbacks&) {
    return Fault{.expected = "a wire", .seen = "none", .exchange = {}};
  });
  ASSERT_NE(FaultOf(shared), nullptr);
  EXPECT_EQ(FaultOf(shared)->seen, "none");
}

}  // namespace
}  // namespace jax_sm_free
