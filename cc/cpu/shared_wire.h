// One wire that several wires share: all buffers of the same processes use the same connections.

#ifndef JAX_SM_FREE_CC_CPU_SHARED_WIRE_H_
#define JAX_SM_FREE_CC_CPU_SHARED_WIRE_H_

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "cc/cpu/block_pool.h"
#include "cc/cpu/wire.h"
#include "cc/fault.h"

namespace jax_sm_free {

// The shared wire closes when the last wire over it closes.
//
// Each wire over it looks like a wire of its own to its user. It has a number, which is the same in
// all processes and precedes each of its messages, and it says goodbye for itself when it closes. A
// message to a wire that is closed here is dropped. A peer that is gone is gone for all wires.
class SharedWire : public std::enable_shared_from_this<SharedWire> {
 public:
  using OpenWire = std::function<Result<std::unique_ptr<Wire>>(Wire::Callbacks callbacks)>;

  // How long a wire waits for answers to its goodbye.
  static constexpr std::chrono::seconds kCloseTimeout{5};

  // `id` is the same in all processes, and differs from the ids of their other wires.
  static Result<std::shared_ptr<SharedWire>> Open(int64_t id, int32_t self, int32_t num_peers,
                                                  const OpenWire& open_wire);
  ~SharedWire();
  SharedWire(const SharedWire&) = delete;
  SharedWire& operator=(const SharedWire&) = delete;

  int64_t id() const { return id_; }

  // Whether the wire has connected and all its peers are there, so that one more wire may share it.
  bool IsSound() const;

  // Adds a wire with a new number. All processes attach before any of them connects.
  std::unique_ptr<Wire> Attach(int64_t number, Wire::Callbacks callbacks);

 private:
  class End;
  enum class Kind : int32_t { kMessage, kGoodbye, kGoodbyeAck };
  struct Label {
    int64_t number = 0;
    Kind kind = Kind::kMessage;
    int32_t unused = 0;
  };
  static_assert(sizeof(Label) == Wire::kMaxLabelBytes);

  SharedWire(int64_t id, int32_t self, int32_t num_peers)
      : id_(id), self_(self), lost_(num_peers) {}

  void Connect(std::vector<std::string> addresses);
  std::vector<Wire::Unreached> AwaitPeers(std::chrono::duration<double> patience);
  void Send(Label label, int32_t peer, Wire::Header header, std::span<const std::byte> payload,
            Wire::OnSent on_sent);
  void Close(End& end);
  bool IsAnswered(const End& end) const;

  // What the wire's thread calls.
  Wire::Callbacks Callbacks();
  End* OpenEnd(int64_t number) const;
  BlockPool::Block Allocate(int32_t peer, Wire::Header header, int64_t bytes) const;
  void OnMessage(int32_t peer, Wire::Header header, BlockPool::Block payload, int64_t bytes);
  void OnLost(int32_t peer, const std::string& reason);
  static void Depart(End& end, int32_t peer, const std::string& reason);

  const int64_t id_;
  const int32_t self_;
  std::unique_ptr<Wire> wire_;

  // Held while callbacks of the wires run, so that none runs for a wire that has closed.
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool connected_ = false;
  std::map<int64_t, End*> ends_;                  // by number
  std::vector<std::optional<std::string>> lost_;  // by process: why it is lost
};

// The wires of this process that new buffers may share.
class SharedWires {
 public:
  static SharedWires& Get();

  // `key` says what must be equal to share a wire: the processes, and how they connect.
  void Add(const std::string& key, const std::shared_ptr<SharedWire>& wire);

  // The newest wire that is sound. Null if there is none.
  std::shared_ptr<SharedWire> Find(const std::string& key);

 private:
  std::mutex mutex_;
  std::multimap<std::string, std::weak_ptr<SharedWire>> wires_;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_SHARED_WIRE_H_
