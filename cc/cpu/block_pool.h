// Memory for messages: blocks of one size, which are used again while their pages are in the
// caches.

#ifndef JAX_SM_FREE_CC_CPU_BLOCK_POOL_H_
#define JAX_SM_FREE_CC_CPU_BLOCK_POOL_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace jax_sm_free {

// Thread-safe. A block may outlive the pool. The operating system gives memory only to pages that
// are written, so a block of the size of the worst case costs only what it holds.
class BlockPool {
 public:
  explicit BlockPool(int64_t block_bytes);

  struct Deleter {
    std::shared_ptr<struct BlockPoolState> state;
    void operator()(std::byte* block) const;
  };
  using Block = std::unique_ptr<std::byte[], Deleter>;

  // A block of `block_bytes`, aligned to 64 bytes. Its content is undefined.
  Block Take();

  // Blocks made so far, in use or not.
  int64_t num_blocks() const;

 private:
  std::shared_ptr<struct BlockPoolState> state_;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_BLOCK_POOL_H_
