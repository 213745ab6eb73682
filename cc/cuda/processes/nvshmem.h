// NVSHMEM: memory of which every process has a piece, and sees the pieces of the others. A PE is
// the number by which NVSHMEM knows a process. No name outside the files about NVSHMEM has this
// word.

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

// The library in this process, for one device. It is never unloaded and never finalized. To
// finalize is collective, so the others would wait for a process that ends alone, and the memory is
// freed with the processes anyway. Thread-safe.
//
// "Collective" means over all PEs, also over those that do not use the memory.
class Nvshmem {
 public:
  // Loads the library at `path`, once.
  static Result<Nvshmem*> Load(const std::string& path);

  // Whether this process takes part already, perhaps because another library has joined.
  bool IsJoined() const;
  int Pe() const;
  int NumPes() const;

  // Bytes by which the processes find each other. One process makes them, and all join with them.
  Result<std::string> MakeId();
  // Joins on the current device. Collective.
  std::optional<Fault> Join(const std::string& id, int pe, int num_pes);

  // Allocates memory on the current device, not zeroed. Null if there is none. Collective.
  void* Allocate(size_t bytes);
  // Collective.
  void Free(void* memory);

  // Where this process sees the memory that `pe` has in the place of `memory`. Null if this process
  // does not reach that memory.
  std::byte* PointerAt(void* memory, int pe) const;

  // Lets Put read memory of this process that is not symmetric.
  std::optional<Fault> Register(void* memory, size_t bytes);
  void Unregister(void* memory);

  // Copies `bytes` > 0 to what `pe` has in the place of `target`. The source is symmetric or
  // registered memory, and stays as it is until the bytes are there. The host moves the bytes, or
  // lets a NIC do it.
  void Put(void* target, const void* source, size_t bytes, int pe);
  // Copies like Put, and returns when the source may change.
  void PutAndWait(void* target, const void* source, size_t bytes, int pe);
  // Writes `value` to what `pe` has in the place of `target`, behind all that was put to `pe`
  // before.
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
