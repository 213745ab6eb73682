// Whether another process of this host still runs.

#ifndef JAX_SM_FREE_CC_CPU_PEER_PROCESS_H_
#define JAX_SM_FREE_CC_CPU_PEER_PROCESS_H_

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace jax_sm_free {

// A process as seen through /proc.
class PeerProcess {
 public:
  // A name that no other process has, on this host or on others.
  static std::string OwnName();

  // The process with that name. Null if it can not be seen from here: it is on another host, or in
  // a container with other process numbers, or /proc does not show it.
  static std::optional<PeerProcess> Find(const std::string& name);

  // Also true while its parent has not reaped it. Its memory and files are gone then.
  bool HasEnded() const;

  int64_t pid() const { return pid_; }

 private:
  PeerProcess(int64_t pid, uint64_t start) : pid_(pid), start_(start) {}

  int64_t pid_;
  uint64_t start_;  // in ticks since boot; a later process with the same number has another start
};

// Watches several processes. For one thread.
class PeerWatch {
 public:
  using Clock = std::chrono::steady_clock;

  static constexpr std::chrono::milliseconds kInterval{500};

  // Starts to watch process `peer`, if its name can be seen from here.
  void Add(int32_t peer, const std::string& name);

  // The processes that have ended since the last call, each with a text about it. Returns none
  // within a fixed interval since the call before.
  std::vector<std::pair<int32_t, std::string>> TakeEnded(Clock::time_point now);

 private:
  std::vector<std::pair<int32_t, PeerProcess>> peers_;
  Clock::time_point looked_;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_PEER_PROCESS_H_
