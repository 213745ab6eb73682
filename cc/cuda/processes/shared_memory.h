// Memory that several processes of one host see.

#ifndef JAX_SM_FREE_CC_CUDA_PROCESSES_SHARED_MEMORY_H_
#define JAX_SM_FREE_CC_CUDA_PROCESSES_SHARED_MEMORY_H_

#include <cstddef>
#include <memory>
#include <string>
#include <utility>

#include "cc/fault.h"

namespace jax_sm_free::cuda {

// A text that two processes have in common if they can share memory. Containers of one host have
// different texts if each has a /dev/shm of its own.
std::string MemoryHost();

// A block of memory under a name, zeros at first. The block has the name until the process that
// created it calls Unname, or drops the block. From then on, nothing is left of the block when the
// processes that opened it have ended, however they end.
class SharedMemory {
 public:
  static Result<std::shared_ptr<SharedMemory>> Create(const std::string& name, size_t bytes);
  static Result<std::shared_ptr<SharedMemory>> Open(const std::string& name, size_t bytes);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  void* data() const { return data_; }
  void Unname();

 private:
  SharedMemory(std::string name, size_t bytes, void* data, bool is_named)
      : name_(std::move(name)), bytes_(bytes), data_(data), is_named_(is_named) {}
  static Result<std::shared_ptr<SharedMemory>> Map(const std::string& name, size_t bytes,
                                                   bool create);

  const std::string name_;
  const size_t bytes_;
  void* const data_;
  bool is_named_;
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_PROCESSES_SHARED_MEMORY_H_
