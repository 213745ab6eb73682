#include "cc/cuda/processes/symmetric_heap.h"

#include <algorithm>

namespace jax_sm_free::cuda {

SymmetricHeap::Ids SymmetricHeap::Dropped() const {
  const std::lock_guard lock(mutex_);
  Ids dropped;
  for (const auto& [id, block] : blocks_) {
    if (block.is_dropped) dropped.insert(id);
  }
  return dropped;
}

std::shared_ptr<void> SymmetricHeap::Use(int64_t id) {
  blocks_[id].is_dropped = false;
  return {blocks_[id].memory, [this, id](void*) {
            const std::lock_guard lock(mutex_);
            blocks_[id].is_dropped = true;
          }};
}

std::shared_ptr<void> SymmetricHeap::Take(size_t bytes, const Ids& dropped_by_all,
                                          const Functions& functions) {
  const std::lock_guard lock(mutex_);
  for (const int64_t id : dropped_by_all) {
    if (blocks_.at(id).bytes == bytes) return Use(id);
  }
  for (const int64_t id : dropped_by_all) {
    functions.free(blocks_.at(id).memory);
    allocated_bytes_ -= blocks_.at(id).bytes;
    blocks_.erase(id);
  }
  // The id counts as used even if there is no memory here, because others may have got some.
  const int64_t id = next_id_++;
  const size_t needed = allocated_bytes_ + bytes;
  void* memory = functions.allocate(bytes, std::max(needed, most_bytes_) - most_bytes_);
  if (memory == nullptr) return nullptr;
  allocated_bytes_ = needed;
  most_bytes_ = std::max(most_bytes_, needed);
  blocks_[id] = {memory, bytes};
  return Use(id);
}

}  // namespace jax_sm_free::cuda
