#include "cc/cpu/message.h"

#include <string>

namespace jax_sm_free {

std::optional<Fault> CheckMessage(const Message& message, int32_t source, int64_t num_rows,
                                  int64_t row_bytes) {
  const MessageHeader& header = message.header();
  if (header.num_rows == num_rows && header.row_bytes == row_bytes) return std::nullopt;
  const auto describe = [](int64_t rows, int64_t bytes) {
    return std::to_string(rows) + " rows of " + std::to_string(bytes) + " bytes";
  };
  return Fault{.peer = source,
               .expected = describe(num_rows, row_bytes),
               .seen = describe(header.num_rows, header.row_bytes),
               .exchange = {}};
}

}  // namespace jax_sm_free
