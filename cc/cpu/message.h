// A packed message and a typed view of it.

#ifndef JAX_SM_FREE_CC_CPU_MESSAGE_H_
#define JAX_SM_FREE_CC_CPU_MESSAGE_H_

#include <cstddef>
#include <cstdint>
#include <new>
#include <optional>
#include <span>
#include <utility>

#include "cc/config.h"
#include "cc/cpu/block_pool.h"
#include "cc/fault.h"
#include "cc/layout.h"

namespace jax_sm_free {

// Owns its block. When the last holder drops the message, the block goes back to the pool of its
// sender.
class Message {
 public:
  Message() = default;
  Message(BlockPool::Block block, const Config& config, const MessageHeader& header)
      : block_(std::move(block)), layout_(LayoutOf(config, header)) {
    new (block_.get()) MessageHeader(header);
  }

  // The message in a block of `bytes` from another process. Null if these bytes are not a message
  // of this configuration.
  static std::optional<Message> FromBlock(BlockPool::Block block, int64_t bytes,
                                          const Config& config);

  const MessageHeader& header() const { return *At<MessageHeader>(0); }
  int32_t* rows_per_expert() const { return At<int32_t>(layout_.rows_per_expert); }
  int32_t* local_expert() const { return At<int32_t>(layout_.local_expert); }
  int32_t* position() const { return At<int32_t>(layout_.position); }
  float* weight() const { return At<float>(layout_.weight); }
  std::span<const std::byte> bytes() const {
    return {block_.get(), static_cast<size_t>(layout_.total)};
  }
  std::byte* row(int64_t i) const { return At<std::byte>(layout_.rows + i * layout_.row_stride); }

 private:
  Message(BlockPool::Block block, const MessageLayout& layout)
      : block_(std::move(block)), layout_(layout) {}

  template <typename T>
  T* At(int64_t offset) const {
    return reinterpret_cast<T*>(block_.get() + offset);
  }

  BlockPool::Block block_;
  MessageLayout layout_;
};

// A fault (without op and rank) unless the message holds `num_rows` rows of `row_bytes`.
std::optional<Fault> CheckMessage(const Message& message, int32_t source, int64_t num_rows,
                                  int64_t row_bytes);

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_MESSAGE_H_
