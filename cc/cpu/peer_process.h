// Whether another process of this host still runs, whatever its parent makes of its end.

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
  // What tells this process from every other one, on this host and on others.
  static std::string OwnName();

  // Null if the process of that name can not be seen from here: it is on another host, or its
  // numbers of processes are not those of this one (a container), or /proc does not show it.
  static std::optional<PeerProcess> Find(const std::string& name);

  // True also while it waits to be reaped by its parent, when its memory and files are gone.
  bool HasEnded() const;

  int64_t pid() const { return pid_; }

 private:
  PeerProcess(int64_t pid, uint64_t start) : pid_(pid), start_(start) {}

  int64_t pid_;
  uint64_t start_;  // in ticks since boot: the number may have been given to another process since
};

// Looks after several of them, from time to time. For one thread.
class PeerWatch {
 public:
  using Clock = std::chrono::steady_clock;

  static constexpr std::chrono::milliseconds kInterval{500};

  // From now on after process `peer`, if that name can be seen from here.
  void Add(int32_t peer, const std::string& name);

  // Those that have ended since the last call, and how to say so; none while the interval since
  // that call is not over.
  std::vector<std::pair<int32_t, std::string>> TakeEnded(Clock::time_point now);

 private:
  std::vector<std::pair<int32_t, PeerProcess>> peers_;
  Clock::time_point looked_;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_PEER_PROCESS_H_
