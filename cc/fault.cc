#include "cc/fault.h"

#include <string>

namespace jax_sm_free {

std::string Fault::Describe() const {
  std::string text = "jax_sm_free: " + op;
  if (rank >= 0) text += " on rank " + std::to_string(rank);
  if (peer >= 0) text += ", peer rank " + std::to_string(peer);
  text += ": expected " + expected + ", seen " + seen;
  if (!exchange.empty()) text += " [" + exchange + "]";
  return text;
}

}  // namespace jax_sm_free
