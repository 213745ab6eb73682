// The sizes of one expert-parallel group. Python checks them first (jax_sm_free/config.py,
// bounds.py).

#ifndef JAX_SM_FREE_CC_CONFIG_H_
#define JAX_SM_FREE_CC_CONFIG_H_

#include <cstdint>

#include "cc/dtype.h"
#include "cc/wire_format.h"

namespace jax_sm_free {

// A recv that has waited this long says once on stderr which ranks it waits for.
inline constexpr double kSlowWaitSeconds = 10.0;

struct Config {
  int32_t ep_size = 1;           // ranks in the group
  int32_t num_experts = 1;       // of the whole group; a multiple of ep_size
  int32_t top_k = 1;             // experts that a token names
  int32_t max_tokens = 1;        // per rank and call
  int64_t recv_capacity = 0;     // expert rows per rank
  int32_t num_slots = 1;         // exchanges in flight
  int64_t expert_alignment = 1;  // a group's size is a multiple of this
  int64_t expert_capacity = 0;   // rows of every group; 0: a group has as many as it needs
  int64_t row_bytes = 0;         // of the widest row that is sent
  double timeout_s = 100.0;      // how long a recv waits for messages
  // How the rows of a dispatch travel.
  WireFormat wire_format = WireFormat::kPlain;
  // The nodes of the group, and the distance from a rank to the rank of the next node with the same
  // place in its node: cc/tiers.h.
  int32_t num_nodes = 1;
  int32_t node_stride = 1;
  DType dtype = DType::kFloat32;  // of rows that are summed

  constexpr int32_t num_local_experts() const { return num_experts / ep_size; }
  constexpr int64_t max_recv_tokens() const { return int64_t{ep_size} * max_tokens; }
  constexpr int32_t node_size() const { return ep_size / num_nodes; }
  constexpr bool has_two_tiers() const { return num_nodes > 1; }
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CONFIG_H_
