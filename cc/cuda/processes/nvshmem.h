// NVSHMEM: memory of which every process has a piece, and sees the others'. What NVSHMEM calls a PE
// is called so here alone: the number by which it knows a process.

#ifndef JAX_SM_FREE_CC_CUDA_PROCESSES_NVSHMEM_H_
#define JAX_SM_FREE_CC_CUDA_PROCESSES_NVSHMEM_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "cc/fault.h"

namespace jax_sm_free::cuda {

// The library of a process, which has one current device for it. It is never unloaded and never
// finalized: that would be collective, so that a process which ends alone would leave the others
// waiting, and the memory goes with the processes anyway. Thread-safe.
//
// To allocate is collective over all PEs, whoever will use the memory.
class Nvshmem {
 public:
  // The library at `path`, loaded once.
  static Result<Nvshmem*> Load(const std::string& path);

  // Whether this process takes part already, be it through another library.
  bool IsJoined() const;
  int Pe() const;
  int NumPes() const;

  // Bytes by which the processes find each other: one makes them, all join with them.
  Result<std::string> MakeId();
  // On the current device. Collective. None if it went well.
  std::optional<Fault> Join(const std::string& id, int pe, int num_pes);

  // On the current device, not zeroed. Collective. Null if there is no memory.
  void* Allocate(size_t bytes);
  // Collective.
  void Free(void* memory);

  // Where this process sees the memory that `pe` has in the place of `memory`; null if nowhere.
  std::byte* PointerAt(void* memory, int pe) const;

  // Lets Put take memory of this process that is not symmetric.
  std::optional<Fault> Register(void* memory, size_t bytes);
  void Unregister(void* memory);

  // Copies to what `pe` has in the place of `target`, from symmetric or registered memory that
  // stays as it is until the bytes are there. The host moves them, or lets a NIC do it.
  void Put(void* target, const void* source, size_t bytes, int pe);
  // The same, and returns when the source is free again.
  void PutAndWait(void* target, const void* source, size_t bytes, int pe);
  // Writes `value` in the place of `target`, behind all that was put there before.
  void PutSignal(void* target, uint64_t value, int pe);

  struct Functions;

 private:
  explicit Nvshmem(std::unique_ptr<const Functions> functions);
  ~Nvshmem() = delete;

  const std::unique_ptr<const Functions> functions_;
  std::mutex mutex_;  // NVSHMEM serves one thread at a time
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_PROCESSES_NVSHMEM_H_
