// What the processes of one host share while a buffer over them is open.

#ifndef JAX_SM_FREE_CC_CUDA_PROCESSES_HOST_MEMORY_H_
#define JAX_SM_FREE_CC_CUDA_PROCESSES_HOST_MEMORY_H_

#include <memory>
#include <utility>

#include "cc/cuda/host/crossbar.h"
#include "cc/cuda/host/group_end.h"
#include "cc/cuda/processes/rendezvous.h"
#include "cc/cuda/processes/shared_memory.h"
#include "cc/fault.h"

namespace jax_sm_free::cuda {

// One block of memory for the processes of a group on this host, and one for those of all groups on
// this host. Of each, the first process creates it.
class HostMemory {
 public:
  // Collective over all processes, which have met. A process keeps what this returns until all have
  // shared.
  static Result<HostMemory> Share(const Rendezvous& rendezvous);

  // The links into the GPUs of the group.
  std::shared_ptr<Crossbar> crossbar() const;
  // The news that ranks of this host can not go on.
  std::shared_ptr<GroupEnd> group_end() const;

  // Called when all processes have shared. From then on, nothing is left of the memory when they
  // have ended, however they end.
  void ForgetNames() const;

 private:
  HostMemory(std::shared_ptr<SharedMemory> group, std::shared_ptr<SharedMemory> mesh)
      : group_(std::move(group)), mesh_(std::move(mesh)) {}

  std::shared_ptr<SharedMemory> group_;  // of a group
  std::shared_ptr<SharedMemory> mesh_;   // of all groups
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_PROCESSES_HOST_MEMORY_H_
