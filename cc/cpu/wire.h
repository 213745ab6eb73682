// Messages between processes.

#ifndef JAX_SM_FREE_CC_CPU_WIRE_H_
#define JAX_SM_FREE_CC_CPU_WIRE_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "cc/cpu/block_pool.h"

namespace jax_sm_free {

// One process's end of the connections to its peers, processes numbered from 0.
//
// A message is a header and a payload. The messages from one peer arrive in the order in which that
// peer sent them, each of them once and whole. A send:
//
//   Send --> queued --> posted --> sent -----> on_sent
//              |          |
//              +----------+------> dropped --> on_sent     the peer is lost, or the wire closed
//
// Thread-safe. Callbacks run on the wire's own thread, one at a time: they must be short, must not
// throw, and may call Send, but not Close.
class Wire {
 public:
  using Header = std::span<const std::byte>;
  using OnSent = std::function<void()>;

  // The longest header that a message may have.
  static constexpr size_t kMaxHeaderBytes = 1024;
  // What a wire that others share may put ahead of theirs.
  static constexpr size_t kMaxLabelBytes = 16;

  struct Callbacks {
    // Whether to receive a message that has a payload. One that is not wanted is dropped, and its
    // sender is not told. Empty: all are wanted.
    std::function<bool(int32_t peer, Header header)> wants;
    // Memory that a payload of `bytes` > 0 is received into, so that it is not copied again. Null
    // refuses the message, and with it its sender: the peer is lost.
    std::function<BlockPool::Block(int32_t peer, Header header, int64_t bytes)> allocate;
    // `payload` is null if `bytes` is 0.
    std::function<void(int32_t peer, Header header, BlockPool::Block payload, int64_t bytes)>
        on_message;
    // Once for each peer that died, closed its wire, or cannot be reached any more. Nothing comes
    // from that peer afterwards, and nothing sent to it arrives. Not for what happens while this
    // wire itself closes.
    std::function<void(int32_t peer, const std::string& reason)> on_lost;
  };

  virtual ~Wire() = default;

  // What the peers need to reach this process: any bytes.
  virtual const std::string& address() const = 0;

  // Opens the connections; to be called once. `addresses` are by process, this one included. Peers
  // may send before this end has connected.
  virtual void Connect(std::vector<std::string> addresses) = 0;

  struct Unreached {
    int32_t peer = -1;
    std::string reason;
  };

  // Waits, after Connect, until each peer has been heard of, which has connected by then, or is
  // lost, but no longer than `patience`. Returns those that have not been heard of, which are lost
  // from then on. All peers can be reached if this returns none in all processes.
  virtual std::vector<Unreached> AwaitPeers(std::chrono::duration<double> patience) = 0;

  // Returns at once. `header` is copied. `payload` must stay as it is until on_sent is called,
  // which happens exactly once: on the wire's thread, or within this call once the wire is closed.
  // on_sent says that the memory is free again, not that the peer has the message. What is
  // sent before Connect waits for it. Not to this process itself.
  virtual void Send(int32_t peer, Header header, std::span<const std::byte> payload,
                    OnSent on_sent) = 0;

  // Waits until the peers have got what was sent before, as far as they live, for a bounded time.
  // There is no callback afterwards. A second call changes nothing.
  virtual void Close() = 0;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_WIRE_H_
