#include "cc/fault.h"

#include <string>

namespace jax_sm_free {

std::string Fault::Describe() const {
  std::string text = "jax_sm_free: " + op;
  if (rank >= 0) text += " on rank " + std::to_string(rank);
  if (node >= 0) text += " of node " + std::to_string(node);
  if (peer >= 0) text += ", peer rank " + std::to_string(peer);
  if (peer_node >= 0) text += " of node " + std::to_string(peer_node);
  text += ": expected " + expected + ", seen " + seen;
  if (!exchange.empty()) text += " [" + exchange + "]";
  return text;
}

}  // namespace jax_sm_free
