// Buffers by id, the ranks they span, their lifetime, and the faults they have seen.

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

  // Ends what waits on this buffer with a fault. Called when its user closes it; a buffer that is
  // only dropped ends what is left by its destructor.
  virtual void Close() = 0;

  // Bytes of messages that the buffer of one rank has taken so far, in use or kept for reuse.
  virtual int64_t MessageBytes(int32_t device) const = 0;

  // What the rank of a device of the buffer has counted. A fault if the device can not be asked.
  virtual Result<RankStats> Stats(int32_t device) = 0;

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

// The process's open buffers.
//
// Python knows a buffer by its id. A program knows it by its name, which was lowered into the
// program and means the same in every process: a description, and behind it the number of the
// buffer among those of one description (jax_sm_free/identity.py). So a program never meets a
// buffer that it was not made for, and a program from another process finds the equal one here.
//
//            Close                          nobody keeps it
//   open -----------------> gone <------------------------------- dropped
//    |                                                               ^
//    +------------------------------ Drop ---------------------------+
//
// Runs may be under way, or begin, in programs that keep the buffer; they find it until it is gone.
class Registry {
 public:
  static Registry& Get();

  // Ids are never used again.
  int64_t NextId();
  // The lowest id that NextId has not given out, nor Add seen. Processes that open a buffer
  // together take the highest of all of theirs.
  int64_t LowestFreeId() const;
  void Add(std::shared_ptr<Buffer> buffer, const std::string& name);
  std::shared_ptr<Buffer> Find(int64_t id) const;  // null if it is closed or never was
  bool Close(int64_t id);                          // false if it was not open
  void CloseAll();
  void Drop(int64_t id);  // for a buffer whose user refers to it no more

  // The open buffer of a program's name. Where this process has had no buffer of this number, the
  // only open one of the same description stands in. A fault if there is none.
  Result<std::shared_ptr<Buffer>> FindFor(std::string_view name) const;

  // Keeps the buffer that FindFor finds from going when it is dropped, as long as the result lives.
  // Null if there is none.
  std::shared_ptr<const void> Keep(std::string_view name);

 private:
  struct Hash {
    using is_transparent = void;
    size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
  };
  struct Open {
    std::shared_ptr<Buffer> buffer;
    std::string name;
    std::weak_ptr<const void> keeper = {};  // what Keep has returned, to all
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
  std::unordered_map<std::string, int64_t, Hash, std::equal_to<>> ids_;  // of all that ever were
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_RUNTIME_H_
