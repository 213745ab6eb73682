// Buffers by id, the ranks they span, their lifetime, and the faults they have seen.

#ifndef JAX_SM_FREE_CC_RUNTIME_H_
#define JAX_SM_FREE_CC_RUNTIME_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "cc/config.h"
#include "cc/fault.h"

namespace jax_sm_free {

// Where a device stands: in which of the buffer's groups, as which rank of it, and at which place
// in the mesh (row-major).
struct Place {
  int32_t group = 0;
  int32_t rank = 0;
  int32_t position = 0;
};

// What all platforms' buffers share. Thread-safe.
class Buffer {
 public:
  // `places` by device ordinal; nullopt for a device outside the buffer's mesh.
  Buffer(int64_t id, const Config& config, std::vector<std::optional<Place>> places)
      : id_(id), config_(config), places_(std::move(places)) {}
  virtual ~Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  int64_t id() const { return id_; }
  const Config& config() const { return config_; }
  std::optional<Place> PlaceOf(int32_t device) const;

  // Ends what waits on this buffer with a fault. Called when it leaves the registry.
  virtual void Close() = 0;

  // Bytes of messages that the buffer of one rank has taken so far, in use or kept for reuse.
  virtual int64_t MessageBytes(int32_t device) const = 0;

  // Keeps the first fault until it is taken.
  void RecordFault(const Fault& fault);
  // What buffer.check() raises. Platforms on which a buffer ends with its first fault keep it.
  virtual std::optional<std::string> TakeFault();

 private:
  const int64_t id_;
  const Config config_;
  const std::vector<std::optional<Place>> places_;
  std::mutex mutex_;
  std::optional<std::string> fault_;
};

// The process's open buffers. A handler finds its buffer by the id that was lowered into it.
class Registry {
 public:
  static Registry& Get();

  // Ids are never used again, so that a program can not meet another buffer than its own.
  int64_t NextId();
  // The lowest id that NextId has not given out, nor Add seen. Processes that open a buffer
  // together take the highest of all of theirs.
  int64_t LowestFreeId() const;
  void Add(std::shared_ptr<Buffer> buffer);
  std::shared_ptr<Buffer> Find(int64_t id) const;  // null if it is closed or never was
  bool Close(int64_t id);                          // false if it was not open

 private:
  mutable std::mutex mutex_;
  int64_t next_id_ = 0;
  std::unordered_map<int64_t, std::shared_ptr<Buffer>> buffers_;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_RUNTIME_H_
