#include "cc/cpu/message.h"

#include "cc/fault_texts.h"

namespace jax_sm_free {

std::optional<Fault> CheckMessage(const Message& message, int32_t source, int64_t num_rows,
                                  int64_t row_bytes) {
  const MessageHeader& header = message.header();
  if (header.num_rows == num_rows && header.row_bytes == row_bytes) return std::nullopt;
  return MessageDiffers(source, num_rows, row_bytes, header.num_rows, header.row_bytes);
}

}  // namespace jax_sm_free
