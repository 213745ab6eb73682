// Ways to place the ranks of a group on nodes, for tests.

#ifndef JAX_SM_FREE_CC_TIERS_TESTING_H_
#define JAX_SM_FREE_CC_TIERS_TESTING_H_

#include <cstdint>

#include "cc/config.h"

namespace jax_sm_free::testing {

struct Nodes {
  int32_t num_nodes;
  int32_t node_size;
  int32_t node_stride;

  constexpr int32_t ep_size() const { return num_nodes * node_size; }

  // `config` with these ranks and nodes.
  constexpr Config AddTo(Config config) const {
    config.ep_size = ep_size();
    config.num_nodes = num_nodes;
    config.node_stride = node_stride;
    return config;
  }
};

}  // namespace jax_sm_free::testing

#endif  // JAX_SM_FREE_CC_TIERS_TESTING_H_
