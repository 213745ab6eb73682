// Which peers of a wire have been heard, and waiting for them.

#ifndef JAX_SM_FREE_CC_CPU_ROLL_CALL_H_
#define JAX_SM_FREE_CC_CPU_ROLL_CALL_H_

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "cc/cpu/wire.h"

namespace jax_sm_free {

// Thread-safe. The first report of a peer stays: that it was heard, or why it never will be.
class RollCall {
 public:
  // Nobody waits for process `self` itself.
  RollCall(int32_t self, int32_t num_peers) : peers_(num_peers) { peers_[self].heard = true; }

  void Hear(int32_t peer);
  void Lose(int32_t peer, const std::string& reason);

  // The peers that are lost, or were not heard within `patience`. Returns as soon as all peers are
  // known.
  std::vector<Wire::Unreached> Await(std::chrono::duration<double> patience);

 private:
  struct Peer {
    bool heard = false;
    std::optional<std::string> lost;
  };

  bool AllKnown() const;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Peer> peers_;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_ROLL_CALL_H_
