// How a rank that knows that the group cannot go on tells ranks of other processes.

#ifndef JAX_SM_FREE_CC_CUDA_HOST_GROUP_END_H_
#define JAX_SM_FREE_CC_CUDA_HOST_GROUP_END_H_

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

// Lies in memory that the processes of a group share. All zeros at first.
struct ClosedNote {
  std::atomic<int32_t> closed;
};

// Lies in memory that the processes of all groups of a buffer share. All zeros at first.
struct FaultNote {
  enum Progress : int32_t { kEmpty, kClaimed, kWritten };
  static_assert(std::atomic<int32_t>::is_always_lock_free);  // so that processes can share it

  std::atomic<int32_t> progress;  // of the text
  char text[2048];                // of the first fault, 0-terminated
};

// A fault ends the ranks of all groups, because all of them run one program. A rank that closes its
// buffer ends the ranks of its own group alone: none of them may get a message any more, while
// other groups may still have work to do.
//
// Thread-safe. If a process dies within a call, the others lose what it had to tell, and nothing
// else.
class GroupEnd {
 public:
  GroupEnd(std::shared_ptr<ClosedNote> closed, std::shared_ptr<FaultNote> fault)
      : closed_(std::move(closed)), fault_(std::move(fault)) {}

  // A rank has closed its buffer.
  void TellClosed() { closed_->closed.store(1, std::memory_order_release); }

  // A rank has met a fault. The first one stays.
  void TellFault(const std::string& text) {
    int32_t expected = FaultNote::kEmpty;
    if (!fault_->progress.compare_exchange_strong(expected, FaultNote::kClaimed)) return;
    std::memcpy(fault_->text, text.data(), std::min(text.size(), sizeof(fault_->text) - 1));
    fault_->progress.store(FaultNote::kWritten, std::memory_order_release);
  }

  // Whether a fault or a closing was told, so that no message may come any more.
  bool HasCome() const {
    return closed_->closed.load(std::memory_order_acquire) != 0 || HasFault();
  }

  bool HasFault() const {
    return fault_->progress.load(std::memory_order_acquire) == FaultNote::kWritten;
  }
  std::optional<std::string> Fault() const {
    if (!HasFault()) return std::nullopt;
    return std::string(fault_->text);
  }

 private:
  const std::shared_ptr<ClosedNote> closed_;
  const std::shared_ptr<FaultNote> fault_;
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_HOST_GROUP_END_H_
