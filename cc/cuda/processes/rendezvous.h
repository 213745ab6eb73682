// How the processes that open a buffer together get to know each other.

#ifndef JAX_SM_FREE_CC_CUDA_PROCESSES_RENDEZVOUS_H_
#define JAX_SM_FREE_CC_CUDA_PROCESSES_RENDEZVOUS_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "cc/cuda/processes/gpu_id.h"
#include "cc/cuda/processes/shared_memory.h"
#include "cc/fault.h"

namespace jax_sm_free::cuda {

// The processes of a buffer's mesh, numbered in an order that is the same in all of them.
struct Processes {
  int32_t index = 0;             // this process
  std::vector<int32_t> of_rank;  // by rank of this process's group
  // Gives a text to all processes, and returns the texts of all of them, by process. Collective.
  // Throws if a process fails or does not come.
  std::function<std::vector<std::string>(const std::string&)> exchange;
  std::function<void(const std::string&)> warn;
};

// What this process knows of the others. Meet must be called first, because the other functions
// return what it has heard.
class Rendezvous {
 public:
  // `processes` outlives this object. `gpu` is this process's. `host` is a text that the processes
  // of one host share.
  Rendezvous(const Processes& processes, const GpuId& gpu, const std::string& host = MemoryHost());

  // Tells all processes of this one, and hears of them. `words` is what the transport tells beside
  // that. Returns the words of all, by process. Refuses processes that share a GPU, because a GPU
  // gives them its time in turn; JAX_SM_FREE_SHARED_GPUS in the environment allows it, for tests
  // with more processes than GPUs. Collective.
  Result<std::vector<std::string>> Meet(const std::string& words);

  const Processes& processes() const { return processes_; }
  int32_t num_processes() const { return static_cast<int32_t>(hellos_.size()); }
  const GpuId& GpuOf(int32_t process) const { return hellos_[process].gpu; }
  bool OnThisHost(int32_t process) const;
  // The first of `candidates` on this host.
  int32_t HostLeader(const std::vector<int32_t>& candidates) const;
  // The start of a name for shared memory that `process` alone creates.
  std::string MemoryNameOf(int32_t process) const { return hellos_[process].memory; }

 private:
  // What a process tells of itself; the words follow.
  struct Hello {
    char host[64];    // 0-terminated, as `memory` is
    char memory[32];  // a name that no other process has
    GpuId gpu;
  };

  const Processes& processes_;
  Hello own_{};
  std::vector<Hello> hellos_;  // by process
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_PROCESSES_RENDEZVOUS_H_
