// Blocks of symmetric memory: whose are in use, whose may be used again.

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
// is, too, but to close one is not: processes close when they like, some without knowing it, and
// one may have died. So a block that is dropped is only marked here. It is freed, or used again, at
// the next opening, if all processes have dropped it: until then a late peer may write into it,
// and finds memory there. Blocks have the same ids everywhere, in the order of their allocation.
class SymmetricHeap {
 public:
  using Ids = std::set<int64_t>;
  struct Functions {
    // Bytes, and those of them for which the heap has to grow: what was freed stays with it.
    std::function<void*(size_t, size_t)> allocate;
    std::function<void(void*)> free;
  };

  // The blocks that this process has dropped.
  Ids Dropped() const;

  // A block of `bytes`, dropped with the last copy of the pointer; null if there is no memory.
  // Collective: all give the same `bytes` and the same `dropped_by_all`. Not zeroed.
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
