#include "cc/cpu/block_pool.h"

#include <cstdlib>
#include <new>

#include "cc/layout.h"
#include "cc/routing.h"

namespace jax_sm_free {

struct BlockPoolState {
  explicit BlockPoolState(int64_t bytes) : block_bytes(RoundUp(bytes, kPartAlignment)) {}
  ~BlockPoolState() {
    for (std::byte* block : free) std::free(block);
  }
  BlockPoolState(const BlockPoolState&) = delete;
  BlockPoolState& operator=(const BlockPoolState&) = delete;

  const int64_t block_bytes;
  std::mutex mutex;
  std::vector<std::byte*> free;
  int64_t num_blocks = 0;
};

BlockPool::BlockPool(int64_t block_bytes) : state_(std::make_shared<BlockPoolState>(block_bytes)) {}

BlockPool::Block BlockPool::Take() {
  {
    const std::lock_guard lock(state_->mutex);
    if (!state_->free.empty()) {
      // The last block that came back is most likely still in the caches.
      std::byte* block = state_->free.back();
      state_->free.pop_back();
      return {block, Deleter{state_}};
    }
    ++state_->num_blocks;
  }
  auto* block = static_cast<std::byte*>(std::aligned_alloc(kPartAlignment, state_->block_bytes));
  if (block == nullptr) throw std::bad_alloc();
  return {block, Deleter{state_}};
}

int64_t BlockPool::num_blocks() const {
  const std::lock_guard lock(state_->mutex);
  return state_->num_blocks;
}

void BlockPool::Deleter::operator()(std::byte* block) const {
  const std::lock_guard lock(state->mutex);
  state->free.push_back(block);
}

}  // namespace jax_sm_free
