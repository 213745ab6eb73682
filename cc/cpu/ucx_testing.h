// What the tests of UCX share.

#ifndef JAX_SM_FREE_CC_CPU_UCX_TESTING_H_
#define JAX_SM_FREE_CC_CPU_UCX_TESTING_H_

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "cc/cpu/block_pool.h"
#include "cc/cpu/ucx_wire.h"

namespace jax_sm_free::testing {

// Path of libucp.so.0. Empty if the pip package is not installed.
std::string UcxLibraryPath();

// A test that needs UCX starts with this.
#define SMF_NEED_UCX()                                                               \
  if (::jax_sm_free::testing::UcxLibraryPath().empty()) {                            \
    GTEST_SKIP() << "libucx-cu13 is gone since the build; `make setup` installs it"; \
  }

// The header of a test's message. All bytes of the payload follow from it.
struct Note {
  int32_t src = 0;
  int32_t dst = 0;
  uint64_t number = 0;
  int64_t bytes = 0;

  bool operator==(const Note&) const = default;
};

std::vector<std::byte> PayloadOf(const Note& note);

struct Arrival {
  int32_t peer = -1;
  Note note;
  BlockPool::Block payload;
  int64_t payload_bytes = 0;
};

// Whether all bits of an arrival are those of `note`.
bool IsIntact(const Arrival& arrival, const Note& note);

struct Loss {
  int32_t peer = -1;
  std::string reason;
};

// A wire, and what it has called back with.
class Node {
 public:
  using Seconds = std::chrono::duration<double>;
  static constexpr Seconds kPatience{100};  // for what is certain to come, even with sanitizers
  static constexpr int64_t kMaxPayloadBytes = int64_t{64} << 20;

  Node(int32_t self, int32_t num_peers);
  ~Node() { wire_->Close(); }
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;

  UcxWire& wire() { return *wire_; }

  // Sends the message that `number` and `bytes` describe.
  Note Send(int32_t peer, uint64_t number, int64_t bytes);

  // The next arrival or loss. Nullopt if there is none within `patience`.
  std::optional<Arrival> Receive(Seconds patience = kPatience);
  std::optional<Loss> WaitForLoss(Seconds patience = kPatience);

  // Whether on_sent was called for all sends.
  bool WaitUntilSent(Seconds patience = kPatience);
  int64_t num_unsent();

  // Called on the wire's thread for each message. The message is not kept then.
  void set_on_arrival(std::function<void(Arrival)> on_arrival);

 private:
  void OnMessage(Arrival arrival);

  BlockPool small_{1 << 16};
  BlockPool large_{kMaxPayloadBytes};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::function<void(Arrival)> on_arrival_;
  std::deque<Arrival> arrivals_;
  std::deque<Loss> losses_;
  int64_t num_unsent_ = 0;
  int32_t self_;
  std::unique_ptr<UcxWire> wire_;  // the last member, because its thread uses the others
};

}  // namespace jax_sm_free::testing

#endif  // JAX_SM_FREE_CC_CPU_UCX_TESTING_H_
