// Blocks of symmetric memory: which of them are in use, and which may be used again.

#ifndef JAX_SM_FREE_CC_CUDA_PROCESSES_SYMMETRIC_HEAP_H_
#define JAX_SM_FREE_CC_CUDA_PROCESSES_SYMMETRIC_HEAP_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>

namespace jax_sm_free::cuda {

// To allocate symmetric memory, and to free it, is collective over all processes. To open a buffer
// is collective, too. To close a buffer is not: processes close at different times, and a process
// may have died. So this class only marks a block that is dropped. The next opening frees the
// block, or uses it again, if all processes have dropped it. Until then a late peer may write into
// the block, and finds memory there. A block has the same id in all processes, because all allocate
// blocks in the same order.
class SymmetricHeap {
 public:
  using Ids = std::set<int64_t>;
  struct Functions {
    // Takes the size of the block, and the bytes by which the heap has to grow. The heap keeps what
    // was freed.
    std::function<void*(size_t, size_t)> allocate;
    std::function<void(void*)> free;
  };

  // The blocks that this process has dropped.
  Ids Dropped() const;

  // A block of `bytes`, not zeroed, which is dropped with the last copy of the pointer. Null if
  // there is no memory. Collective: all give the same `bytes` and the same `dropped_by_all`.
  std::shared_ptr<void> Take(size_t bytes, const Ids& dropped_by_all, const Functions& functions);

 private:
  struct Block {
    void* memory = nullptr;
    size_t bytes = 0;
    bool is_dropped = false;
  };
  std::shared_ptr<void> Use(int64_t id);

  mutable std::mutex mutex_;
  int64_t next_id_ = 0;
  size_t allocated_bytes_ = 0;  // now
  size_t most_bytes_ = 0;       // ever
  std::map<int64_t, Block> blocks_;
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_PROCESSES_SYMMETRIC_HEAP_H_
