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

// One process's end of the connections to its peers. Processes are numbered from 0.
//
// A message is a header and a payload. The messages from a peer arrive in the order in which the
// peer sent them, each of them once and completely. A message that is sent has these states:
//
//   Send --> queued --> posted --> sent -----> on_sent
//              |          |
//              +----------+------> dropped --> on_sent     the peer is lost, or the wire closed
//
// Thread-safe. Callbacks run on the wire's own thread, one at a time. They must be short, must not
// throw, and may call Send, but not Close.
class Wire {
 public:
  using Header = std::span<const std::byte>;
  using OnSent = std::function<void()>;

  // The longest header that a message may have.
  static constexpr size_t kMaxHeaderBytes = 1024;
  // The bytes that a shared wire may add in front of the header of a message.
  static constexpr size_t kMaxLabelBytes = 16;

  struct Callbacks {
    // Whether to receive a message that has a payload. A message that is not wanted is dropped
    // without telling its sender. If this is empty, all messages are wanted.
    std::function<bool(int32_t peer, Header header)> wants;
    // Returns memory for a payload of `bytes` > 0, which is received there, without a further copy.
    // Null refuses the message and disconnects its sender: the peer is lost.
    std::function<BlockPool::Block(int32_t peer, Header header, int64_t bytes)> allocate;
    // `payload` is null if `bytes` is 0.
    std::function<void(int32_t peer, Header header, BlockPool::Block payload, int64_t bytes)>
        on_message;
    // Called once for each peer that has died, has closed its wire, or can no longer be reached.
    // Nothing comes from that peer afterwards, and nothing that is sent to it arrives. Not called
    // for peers that leave while this wire itself closes.
    std::function<void(int32_t peer, const std::string& reason)> on_lost;
  };

  virtual ~Wire() = default;

  // Bytes that the peers need to reach this process.
  virtual const std::string& address() const = 0;

  // Opens the connections. Call this once. `addresses` is by process, including this one. Peers may
  // send before this end has connected.
  virtual void Connect(std::vector<std::string> addresses) = 0;

  struct Unreached {
    int32_t peer = -1;
    std::string reason;
  };

  // Waits, after Connect, until each peer was heard or is lost, but no longer than `patience`. A
  // peer that was heard has connected. Returns the peers that were not heard, which count as lost
  // from then on. If this returns none in all processes, all peers can reach each other.
  virtual std::vector<Unreached> AwaitPeers(std::chrono::duration<double> patience) = 0;

  // Returns at once. `header` is copied. `payload` must not change until on_sent is called. on_sent
  // is called exactly once: on the wire's thread, or within this call if the wire is closed. It
  // says that the memory is free again, not that the peer has the message. Messages that are sent
  // before Connect wait for it. `peer` must not be this process.
  virtual void Send(int32_t peer, Header header, std::span<const std::byte> payload,
                    OnSent on_sent) = 0;

  // Waits until the live peers have received what was sent before, but not longer than a fixed
  // time. There is no callback afterwards. A second call does nothing.
  virtual void Close() = 0;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_WIRE_H_
