#include "cc/runtime.h"

#include <algorithm>
#include <cstddef>
#include <utility>

namespace jax_sm_free {

std::optional<Place> Buffer::PlaceOf(int32_t device) const {
  if (device < 0 || static_cast<size_t>(device) >= places_.size()) return std::nullopt;
  return places_[device];
}

void Buffer::RecordFault(const Fault& fault) {
  const std::lock_guard lock(mutex_);
  if (!fault_) fault_ = fault.Describe();
}

std::optional<std::string> Buffer::TakeFault() {
  const std::lock_guard lock(mutex_);
  return std::exchange(fault_, std::nullopt);
}

Registry& Registry::Get() {
  static auto* registry = new Registry;  // never destroyed: handlers may outlive static destructors
  return *registry;
}

int64_t Registry::NextId() {
  const std::lock_guard lock(mutex_);
  return next_id_++;
}

int64_t Registry::LowestFreeId() const {
  const std::lock_guard lock(mutex_);
  return next_id_;
}

void Registry::Add(std::shared_ptr<Buffer> buffer) {
  const std::lock_guard lock(mutex_);
  const int64_t id = buffer->id();
  next_id_ = std::max(next_id_, id + 1);
  buffers_[id] = std::move(buffer);
}

std::shared_ptr<Buffer> Registry::Find(int64_t id) const {
  const std::lock_guard lock(mutex_);
  const auto found = buffers_.find(id);
  return found == buffers_.end() ? nullptr : found->second;
}

bool Registry::Close(int64_t id) {
  std::shared_ptr<Buffer> buffer;
  {
    const std::lock_guard lock(mutex_);
    const auto found = buffers_.find(id);
    if (found == buffers_.end()) return false;
    buffer = std::move(found->second);
    buffers_.erase(found);
  }
  buffer->Close();
  return true;
}

}  // namespace jax_sm_free
