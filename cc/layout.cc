#include "cc/layout.h"

namespace jax_sm_free {

const char* KindName(Kind kind) {
  switch (kind) {
    case Kind::kDispatch:
      return "dispatch";
    case Kind::kCombine:
      return "combine";
    case Kind::kDispatchBackward:
      return "dispatch_backward";
    case Kind::kCombineBackward:
      return "combine_backward";
  }
  return "unknown";
}

MessageLayout LayoutOf(const Config& config, const MessageHeader& header) {
  const Kind kind = static_cast<Kind>(header.kind);
  const bool routed = kind == Kind::kDispatch;
  const bool weighted = routed || kind == Kind::kDispatchBackward;
  const int64_t entry_bytes = int64_t{header.num_rows} * config.top_k * int64_t{sizeof(int32_t)};

  int64_t end = sizeof(MessageHeader);
  auto place = [&end](int64_t bytes) {
    const int64_t offset = end;
    end += (bytes + kPartAlignment - 1) / kPartAlignment * kPartAlignment;
    return offset;
  };
  MessageLayout layout;
  layout.rows_per_expert =
      place(routed ? config.num_local_experts() * int64_t{sizeof(int32_t)} : 0);
  layout.local_expert = place(routed ? entry_bytes : 0);
  layout.position = place(routed ? entry_bytes : 0);
  layout.weight = place(weighted ? entry_bytes : 0);
  layout.rows = place(header.num_rows * header.row_bytes);
  layout.total = end;
  return layout;
}

int64_t MaxMessageBytes(const Config& config) {
  // A dispatch has every part that any kind has.
  const MessageHeader header{.kind = static_cast<int32_t>(Kind::kDispatch),
                             .num_rows = config.max_tokens,
                             .row_bytes = config.row_bytes};
  return LayoutOf(config, header).total;
}

}  // namespace jax_sm_free
