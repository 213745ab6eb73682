// That the ranks of a group can not go on, told by the one that knows to those of other processes.

#ifndef JAX_SM_FREE_CC_CUDA_GROUP_END_H_
#define JAX_SM_FREE_CC_CUDA_GROUP_END_H_

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>

namespace jax_sm_free::cuda {

// In memory that processes share. All zeros at first.
struct EndNote {
  enum Progress : int32_t { kEmpty, kClaimed, kWritten };
  static_assert(std::atomic<int32_t>::is_always_lock_free);  // else it could not be shared

  std::atomic<int32_t> closed;
  std::atomic<int32_t> progress;  // of the text
  char text[2048];                // of the first fault, 0-terminated
};

// Thread-safe, and safe beside a process that dies within a call: what it had to tell is lost.
class GroupEnd {
 public:
  explicit GroupEnd(std::shared_ptr<EndNote> note) : note_(std::move(note)) {}

  // A rank has closed its buffer.
  void TellClosed() { note_->closed.store(1, std::memory_order_release); }

  // A rank has met a fault. The first one stays.
  void TellFault(const std::string& text) {
    int32_t expected = EndNote::kEmpty;
    if (!note_->progress.compare_exchange_strong(expected, EndNote::kClaimed)) return;
    std::memcpy(note_->text, text.data(), std::min(text.size(), sizeof(note_->text) - 1));
    note_->progress.store(EndNote::kWritten, std::memory_order_release);
  }

  // Whether one of these was told: no message may come any more.
  bool HasCome() const { return note_->closed.load(std::memory_order_acquire) != 0 || HasFault(); }

  bool HasFault() const {
    return note_->progress.load(std::memory_order_acquire) == EndNote::kWritten;
  }
  std::optional<std::string> Fault() const {
    if (!HasFault()) return std::nullopt;
    return std::string(note_->text);
  }

 private:
  const std::shared_ptr<EndNote> note_;
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_GROUP_END_H_
