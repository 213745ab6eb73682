#include "cc/runtime.h"

#include <algorithm>
#include <cstddef>
#include <thread>
#include <utility>

namespace jax_sm_free {
namespace {

// The description in a name.
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
  const Result<const Open*> open = Resolve(name);
  if (const Fault* fault = FaultOf(open)) return *fault;
  return std::get<const Open*>(open)->buffer;
}

Result<const Registry::Open*> Registry::Resolve(std::string_view name) const {
  if (const auto id = ids_.find(name); id != ids_.end()) {
    if (const auto found = buffers_.find(id->second); found != buffers_.end()) {
      return &found->second;
    }
    return Fault{.expected = "buffer " + std::to_string(id->second) + " to be open",
                 .seen = "it is closed, or was collected as garbage",
                 .exchange = {}};
  }
  const std::vector<const Open*> alike = OpenLike(name);
  if (alike.size() == 1) return alike.front();
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

// Open buffers with the description in `name`. Dropped ones are returned only if all of them are
// dropped.
std::vector<const Registry::Open*> Registry::OpenLike(std::string_view name) const {
  std::vector<const Open*> alike;
  std::vector<const Open*> dropped;
  for (const auto& [id, open] : buffers_) {
    if (DescriptionIn(open.name) != DescriptionIn(name)) continue;
    (open.dropped ? dropped : alike).push_back(&open);
  }
  return alike.empty() ? dropped : alike;
}

std::string Registry::NamesOfOpen() const {
  std::string names;
  for (const auto& [id, open] : buffers_) {
    names += (names.empty() ? "open buffers: " : "; ") + std::string(DescriptionIn(open.name));
  }
  return names.empty() ? "no open buffer" : names;
}

// Removes a buffer from the registry and returns it. Null if it is not there, or does not meet the
// condition.
std::shared_ptr<Buffer> Registry::TakeIf(int64_t id,
                                         const std::function<bool(Open& open)>& condition) {
  const std::lock_guard lock(mutex_);
  const auto found = buffers_.find(id);
  if (found == buffers_.end() || !condition(found->second)) return nullptr;
  std::shared_ptr<Buffer> buffer = std::move(found->second.buffer);
  buffers_.erase(found);
  return buffer;
}

bool Registry::Close(int64_t id) {
  const std::shared_ptr<Buffer> buffer = TakeIf(id, [](Open&) { return true; });
  if (buffer != nullptr) buffer->Close();
  return buffer != nullptr;
}

void Registry::CloseAll() {
  std::vector<int64_t> ids;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [id, open] : buffers_) ids.push_back(id);
  }
  for (const int64_t id : ids) Close(id);
}

void Registry::Drop(int64_t id) {
  (void)TakeIf(id, [](Open& open) {
    open.dropped = true;
    return open.keeper.expired();
  });
}

std::shared_ptr<const void> Registry::Keep(std::string_view name) {
  const std::lock_guard lock(mutex_);
  const Result<const Open*> found = Resolve(name);
  if (FaultOf(found) != nullptr) return nullptr;
  const int64_t id = std::get<const Open*>(found)->buffer->id();
  Open& open = buffers_.at(id);
  std::shared_ptr<const void> keeper = open.keeper.lock();
  if (keeper == nullptr) {
    keeper =
        std::shared_ptr<const void>(open.buffer.get(), [this, id](const void*) { OnUnkept(id); });
    open.keeper = keeper;
  }
  return keeper;
}

void Registry::OnUnkept(int64_t id) {
  std::shared_ptr<Buffer> buffer =
      TakeIf(id, [](Open& open) { return open.dropped && open.keeper.expired(); });
  if (buffer == nullptr) return;
  // A thread of its own ends the buffer, because that may take long, and because this thread may
  // hold locks of others: a program is just being dropped.
  std::thread([buffer = std::move(buffer)]() mutable { buffer.reset(); }).detach();
}

}  // namespace jax_sm_free
