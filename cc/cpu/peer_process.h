// Whether another process of this host still runs, whatever its parent makes of its end.

#ifndef JAX_SM_FREE_CC_CPU_PEER_PROCESS_H_
#define JAX_SM_FREE_CC_CPU_PEER_PROCESS_H_

#include <cstdint>
#include <optional>
#include <string>

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

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_PEER_PROCESS_H_
