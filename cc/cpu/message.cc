#include "cc/cpu/message.h"

#include "cc/fault_texts.h"

namespace jax_sm_free {

std::optional<Message> Message::FromBlock(BlockPool::Block block, int64_t bytes,
                                          const Config& config) {
  if (bytes < static_cast<int64_t>(sizeof(MessageHeader))) return std::nullopt;
  const auto& header = *reinterpret_cast<const MessageHeader*>(block.get());
  const bool fits = header.kind >= 0 && header.kind < kNumKinds && header.num_rows >= 0 &&
                    header.num_rows <= config.max_tokens && header.row_bytes >= 0 &&
                    header.row_bytes <= config.row_bytes;
  if (!fits) return std::nullopt;
  const MessageLayout layout = LayoutOf(config, header);
  if (layout.total != bytes) return std::nullopt;
  return Message(std::move(block), layout);
}

std::optional<Fault> CheckMessage(const Message& message, int32_t source, int64_t num_rows,
                                  int64_t row_bytes) {
  const MessageHeader& header = message.header();
  if (header.num_rows == num_rows && header.row_bytes == row_bytes) return std::nullopt;
  return MessageDiffers(source, num_rows, row_bytes, header.num_rows, header.row_bytes);
}

}  // namespace jax_sm_free
