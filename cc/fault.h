// What went wrong in an exchange, in words that a user can act on.

#ifndef JAX_SM_FREE_CC_FAULT_H_
#define JAX_SM_FREE_CC_FAULT_H_

#include <string>
#include <utility>
#include <variant>

namespace jax_sm_free {

struct Fault {
  std::string op = {};  // the operation that saw it, as Python names it
  int rank = -1;        // the rank that saw it; -1 if no rank did
  int peer = -1;        // the rank that caused it; -1 if that is not known
  int node = -1;        // of `rank`, in a group of two tiers; else -1
  int peer_node = -1;   // of `peer`, likewise
  std::string expected;
  std::string seen;
  std::string exchange;  // "exchange 12 (slot 1)"; empty if there was no exchange yet

  std::string Describe() const;
};

// A value, or a fault if there is no value.
template <typename T>
using Result = std::variant<T, Fault>;

template <typename T>
const Fault* FaultOf(const Result<T>& result) {
  return std::get_if<Fault>(&result);
}

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_FAULT_H_
