#include "cc/cpu/ucx_testing.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <span>
#include <utility>

#include "gtest/gtest.h"

// The sanitizers are libraries of their own, and find these functions by name.
#ifdef __SANITIZE_ADDRESS__
// UCX does not free a few bytes when it connects to memory of a process that is gone.
extern "C" [[gnu::visibility("default")]] const char* __lsan_default_suppressions();
extern "C" const char* __lsan_default_suppressions() { return "leak:uct_mm_ep_attach_remote_seg"; }
#endif

#ifdef __SANITIZE_THREAD__
// UCX is not instrumented, so the sanitizer does not see how UCX orders its threads.
extern "C" [[gnu::visibility("default")]] const char* __tsan_default_options();
extern "C" const char* __tsan_default_options() { return "ignore_noninstrumented_modules=1"; }
#endif

namespace jax_sm_free::testing {

std::string UcxLibraryPath() {
  std::string path = SMF_UCX_LIBRARY;
  if (!std::filesystem::exists(path)) path.clear();
  return path;
}

std::vector<std::byte> PayloadOf(const Note& note) {
  std::vector<std::byte> payload(note.bytes);
  uint64_t word = (note.number * 1000003 + static_cast<uint64_t>(note.src) * 101 + note.dst) | 1;
  for (size_t i = 0; i < payload.size(); i += sizeof(word)) {
    word = word * 6364136223846793005U + 1442695040888963407U;
    std::memcpy(&payload[i], &word, std::min(sizeof(word), payload.size() - i));
  }
  return payload;
}

bool IsIntact(const Arrival& arrival, const Note& note) {
  if (arrival.peer != note.src || arrival.note != note) return false;
  if (arrival.payload_bytes != note.bytes) return false;
  if (note.bytes == 0) return arrival.payload == nullptr;
  const std::vector<std::byte> expected = PayloadOf(note);
  return std::memcmp(arrival.payload.get(), expected.data(), expected.size()) == 0;
}

Node::Node(int32_t self, int32_t num_peers) : self_(self) {
  Wire::Callbacks callbacks;
  callbacks.allocate = [this](int32_t, Wire::Header, int64_t bytes) -> BlockPool::Block {
    if (bytes > kMaxPayloadBytes) return {};
    return bytes <= 1 << 16 ? small_.Take() : large_.Take();
  };
  callbacks.on_message = [this](int32_t peer, Wire::Header header, BlockPool::Block payload,
                                int64_t bytes) {
    Arrival arrival{
        .peer = peer, .note = {}, .payload = std::move(payload), .payload_bytes = bytes};
    if (header.size() == sizeof(Note)) std::memcpy(&arrival.note, header.data(), sizeof(Note));
    OnMessage(std::move(arrival));
  };
  callbacks.on_lost = [this](int32_t peer, const std::string& reason) {
    const std::lock_guard lock(mutex_);
    losses_.push_back({peer, reason});
    changed_.notify_all();
  };
  auto wire = UcxWire::Open({.library = UcxLibraryPath(), .self = self, .num_peers = num_peers},
                            std::move(callbacks));
  if (const Fault* fault = FaultOf(wire)) {
    ADD_FAILURE() << fault->Describe();
    std::abort();
  }
  wire_ = std::move(std::get<0>(wire));
}

void Node::OnMessage(Arrival arrival) {
  std::unique_lock lock(mutex_);
  if (on_arrival_) {
    lock.unlock();
    on_arrival_(std::move(arrival));
    return;
  }
  arrivals_.push_back(std::move(arrival));
  changed_.notify_all();
}

void Node::set_on_arrival(std::function<void(Arrival)> on_arrival) {
  const std::lock_guard lock(mutex_);
  on_arrival_ = std::move(on_arrival);
}

Note Node::Send(int32_t peer, uint64_t number, int64_t bytes) {
  const Note note{.src = self_, .dst = peer, .number = number, .bytes = bytes};
  auto payload = std::make_shared<std::vector<std::byte>>(PayloadOf(note));
  {
    const std::lock_guard lock(mutex_);
    ++num_unsent_;
  }
  wire_->Send(peer, std::as_bytes(std::span(&note, 1)), *payload, [this, payload] {
    const std::lock_guard lock(mutex_);
    --num_unsent_;
    changed_.notify_all();
  });
  return note;
}

std::optional<Arrival> Node::Receive(Seconds patience) {
  std::unique_lock lock(mutex_);
  if (!changed_.wait_for(lock, patience, [this] { return !arrivals_.empty(); })) return {};
  Arrival arrival = std::move(arrivals_.front());
  arrivals_.pop_front();
  return arrival;
}

std::optional<Loss> Node::WaitForLoss(Seconds patience) {
  std::unique_lock lock(mutex_);
  if (!changed_.wait_for(lock, patience, [this] { return !losses_.empty(); })) return {};
  Loss loss = std::move(losses_.front());
  losses_.pop_front();
  return loss;
}

bool Node::WaitUntilSent(Seconds patience) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, patience, [this] { return num_unsent_ == 0; });
}

int64_t Node::num_unsent() {
  const std::lock_guard lock(mutex_);
  return num_unsent_;
}

}  // namespace jax_sm_free::testing
