#include "cc/cpu/start_numbers.h"

namespace jax_sm_free {

StartNumbers::Node StartNumbers::Find(const Executable& executable) {
  const auto found = nodes_.find(executable);
  if (found == nodes_.end()) return {.parent = executable};
  const Node parent = Find(found->second.parent);
  found->second = {.parent = parent.parent, .above = found->second.above + parent.above};
  return found->second;
}

std::optional<int32_t> StartNumbers::Difference(const Executable& one, const Executable& other) {
  const Node low = Find(one);
  const Node high = Find(other);
  if (low.parent != high.parent) return std::nullopt;
  return static_cast<int32_t>(high.above - low.above);
}

void StartNumbers::Learn(const Executable& one, const Executable& other, int32_t difference) {
  const Node low = Find(one);
  const Node high = Find(other);
  nodes_[high.parent] = {.parent = low.parent,
                         .above = low.above + static_cast<uint32_t>(difference) - high.above};
}

}  // namespace jax_sm_free
