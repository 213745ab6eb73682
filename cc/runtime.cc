#include "cc/runtime.h"

#include <algorithm>
#include <cstddef>
#include <utility>

namespace jax_sm_free {
namespace {

// A name without its number.
std::string_view DescriptionIn(std::string_view name) { return name.substr(0, name.rfind(" #")); }

}  // namespace

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

void Registry::Add(std::shared_ptr<Buffer> buffer, const std::string& name) {
  const std::lock_guard lock(mutex_);
  const int64_t id = buffer->id();
  next_id_ = std::max(next_id_, id + 1);
  ids_[name] = id;
  buffers_[id] = {std::move(buffer), name};
}

std::shared_ptr<Buffer> Registry::Find(int64_t id) const {
  const std::lock_guard lock(mutex_);
  const auto found = buffers_.find(id);
  return found == buffers_.end() ? nullptr : found->second.buffer;
}

Result<std::shared_ptr<Buffer>> Registry::FindFor(std::string_view name) const {
  const std::lock_guard lock(mutex_);
  if (const auto id = ids_.find(name); id != ids_.end()) {
    if (const auto found = buffers_.find(id->second); found != buffers_.end()) {
      return found->second.buffer;
    }
    return Fault{.expected = "buffer " + std::to_string(id->second) + " to be open",
                 .seen = "it is closed",
                 .exchange = {}};
  }
  const std::vector<const Open*> alike = OpenLike(name);
  if (alike.size() == 1) return alike.front()->buffer;
  if (alike.empty()) {
    return Fault{.expected = "the buffer that this program was made for to be open: " +
                             std::string(DescriptionIn(name)),
                 .seen = NamesOfOpen(),
                 .exchange = {}};
  }
  return Fault{.expected = "one buffer that is like the one that this program was made for (" +
                           std::string(name) + "), or one with its number",
               .seen = std::to_string(alike.size()) +
                       " that are alike; Buffer(..., name=) tells equal buffers apart",
               .exchange = {}};
}

std::vector<const Registry::Open*> Registry::OpenLike(std::string_view name) const {
  std::vector<const Open*> alike;
  for (const auto& [id, open] : buffers_) {
    if (DescriptionIn(open.name) == DescriptionIn(name)) alike.push_back(&open);
  }
  return alike;
}

std::string Registry::NamesOfOpen() const {
  std::string names;
  for (const auto& [id, open] : buffers_) {
    names += (names.empty() ? "open buffers: " : "; ") + std::string(DescriptionIn(open.name));
  }
  return names.empty() ? "no open buffer" : names;
}

bool Registry::Close(int64_t id) {
  std::shared_ptr<Buffer> buffer;
  {
    const std::lock_guard lock(mutex_);
    const auto found = buffers_.find(id);
    if (found == buffers_.end()) return false;
    buffer = std::move(found->second.buffer);
    buffers_.erase(found);
  }
  buffer->Close();
  return true;
}

}  // namespace jax_sm_free
