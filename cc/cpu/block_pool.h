// Memory for messages: blocks of one size that are used again, so that pages stay warm.

#ifndef JAX_SM_FREE_CC_CPU_BLOCK_POOL_H_
#define JAX_SM_FREE_CC_CPU_BLOCK_POOL_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace jax_sm_free {

// Thread-safe. A block may outlive the pool. Pages of a block that are never written are never
// taken from the operating system, so that a block sized for the worst case costs what it holds.
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
