// Open buffers by id, their ranks, their lifetime, and the faults that they have seen.

#ifndef JAX_SM_FREE_CC_RUNTIME_H_
#define JAX_SM_FREE_CC_RUNTIME_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "cc/config.h"
#include "cc/fault.h"
#include "cc/rank_stats.h"

namespace jax_sm_free {

// The place of a device: its group in the buffer, its rank in the group, and its position in the
// mesh (row-major).
struct Place {
  int32_t group = 0;
  int32_t rank = 0;
  int32_t position = 0;
};

// The part of a buffer that is the same on all platforms. Thread-safe.
class Buffer {
 public:
  // `places` is by device ordinal. nullopt stands for a device outside the mesh of the buffer.
  Buffer(int64_t id, const Config& config, std::vector<std::optional<Place>> places)
      : id_(id), config_(config), places_(std::move(places)) {}
  virtual ~Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  int64_t id() const { return id_; }
  const Config& config() const { return config_; }
  std::optional<Place> PlaceOf(int32_t device) const;

  // Ends all waits on this buffer with a fault. Called when the user closes the buffer. A buffer
  // that is only dropped ends them in its destructor.
  virtual void Close() = 0;

  // Bytes of the memory for messages that one rank has allocated so far, used or free.
  virtual int64_t MessageBytes(int32_t device) const = 0;

  // What the rank of a device has counted. Returns a fault if the device can not be read.
  virtual Result<RankStats> Stats(int32_t device) = 0;

  // Keeps the first fault until it is taken.
  void RecordFault(const Fault& fault);
  // The fault for buffer.check() to raise. A platform on which a buffer ends with its first fault
  // keeps the fault.
  virtual std::optional<std::string> TakeFault();

 private:
  const int64_t id_;
  const Config config_;
  const std::vector<std::optional<Place>> places_;
  std::mutex mutex_;
  std::optional<std::string> fault_;
};

// The open buffers of the process.
//
// Python knows a buffer by its id. A program knows a buffer by a name, which is lowered into the
// program and means the same in every process. The name is a description, followed by a number that
// tells apart buffers of the same description (jax_sm_free/identity.py). So a program never uses a
// buffer that it was not made for, and a program from another process finds the same buffer here.
//
//            Close                          nobody keeps it
//   open -----------------> gone <------------------------------- dropped
//    |                                                               ^
//    +------------------------------ Drop ---------------------------+
//
// Programs that keep a buffer may still run or start. They find the buffer until it is gone.
class Registry {
 public:
  static Registry& Get();

  // Ids are never used again.
  int64_t NextId();
  // The lowest id that neither NextId has returned nor Add has seen. Processes that open a buffer
  // together use the highest of their lowest free ids.
  int64_t LowestFreeId() const;
  void Add(std::shared_ptr<Buffer> buffer, const std::string& name);
  std::shared_ptr<Buffer> Find(int64_t id) const;  // null if it is closed or never was open
  bool Close(int64_t id);                          // false if it was not open
  void CloseAll();
  void Drop(int64_t id);  // for a buffer whose user no longer refers to it

  // The open buffer with the name that a program has for it. If this process has never had a buffer
  // of this name, the only open buffer of the same description takes its place. A fault if there is
  // none.
  Result<std::shared_ptr<Buffer>> FindFor(std::string_view name) const;

  // Keeps the buffer that FindFor finds open while the result lives, also when it is dropped. Null
  // if FindFor finds none.
  std::shared_ptr<const void> Keep(std::string_view name);

 private:
  struct Hash {
    using is_transparent = void;
    size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
  };
  struct Open {
    std::shared_ptr<Buffer> buffer;
    std::string name;
    std::weak_ptr<const void> keeper = {};  // the result of Keep, shared by all callers
    bool dropped = false;
  };

  Result<const Open*> Resolve(std::string_view name) const;
  std::vector<const Open*> OpenLike(std::string_view name) const;
  std::shared_ptr<Buffer> TakeIf(int64_t id, const std::function<bool(Open& open)>& condition);
  void OnUnkept(int64_t id);
  std::string NamesOfOpen() const;

  mutable std::mutex mutex_;
  int64_t next_id_ = 0;
  std::unordered_map<int64_t, Open> buffers_;
  std::unordered_map<std::string, int64_t, Hash, std::equal_to<>> ids_;  // of all buffers ever
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_RUNTIME_H_
