// Memory that several processes of one host see.

#ifndef JAX_SM_FREE_CC_CUDA_PROCESSES_SHARED_MEMORY_H_
#define JAX_SM_FREE_CC_CUDA_PROCESSES_SHARED_MEMORY_H_

#include <cstddef>
#include <memory>
#include <string>
#include <utility>

#include "cc/fault.h"

namespace jax_sm_free::cuda {

// Names what this process shares memory with: two processes with the same text can. Containers of
// one host differ in it if each has a /dev/shm of its own.
std::string MemoryHost();

// A block of zeros under a name. It has the name until the process that created it says Unname, or
// drops the block: then nothing is left of it when the processes that opened it have ended, however
// they end.
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
