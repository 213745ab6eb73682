// The routing that a dispatch writes into its messages.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_ROUTING_OUT_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_ROUTING_OUT_CUH_

#include <cstddef>
#include <cstdint>

#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/kernels.h"
#include "cc/cuda/kernels/tile.cuh"

namespace jax_sm_free::cuda {

// Where the routing of one message is written.
struct RoutingOut {
  int32_t* local_expert;
  int32_t* position;
  float* weight;
  int32_t* number;  // null if the place of each row is its number
  Placing placing;
};

__device__ inline RoutingOut RoutingOf(const RankView& view, int32_t number) {
  const int32_t slot = view.state->current.slot;
  std::byte* message = OutMessage(view, slot, number);
  const MessageHeader& header = HeaderOf(message);
  const MessageLayout layout = LayoutOf(view.config, header);
  RoutingOut out;
  out.local_expert = PartOf<int32_t>(message, layout.local_expert);
  out.position = PartOf<int32_t>(message, layout.position);
  out.weight = PartOf<float>(message, layout.weight);
  out.number = header.num_common > 0 ? PartOf<int32_t>(message, layout.number) : nullptr;
  out.placing = PlacingOf(header);
  return out;
}

// Writes the place of a token row in a message.
__device__ inline void WriteNumber(const RankView& view, const RoutingOut& out, int32_t message,
                                   int32_t number, const CommonBefore& common, int64_t token) {
  if (message == view.rank) {
    const int64_t first = int64_t{view.state->current.slot} * view.config.max_tokens;
    view.own_token[first + number] = static_cast<int32_t>(token);
  } else if (out.number != nullptr) {
    out.number[PlaceOf(out.placing, number, common)] = number;
  }
}

// Writes the routing of one (token, k) into all messages that have the token.
__device__ inline void WriteRouting(const RankView& view, const RouteArgs& args,
                                    const RoutingOut* outs, const CommonBefore& common,
                                    int64_t token, int32_t k, const Entry& expert,
                                    int32_t position) {
  constexpr int kUnroll = 8;  // lanes that are read in one round trip to memory
  const Config& config = view.config;
  const int32_t num_lanes = view.messages.num_lanes;
  const float weight = args.topk.weights[token * config.top_k + k];
  for (int32_t first = 0; first < num_lanes; first += kUnroll) {
    int32_t numbers[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int32_t lane = first + u;
      numbers[u] = lane < num_lanes ? view.row_of[token * num_lanes + lane] : -1;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (numbers[u] < 0) continue;
      const RoutingOut& out = outs[first + u];
      const bool here = expert.lane == first + u;
      const int64_t entry = int64_t{PlaceOf(out.placing, numbers[u], common)} * config.top_k + k;
      out.local_expert[entry] = here ? expert.local : -1;
      out.position[entry] = here ? position : 0;
      out.weight[entry] = here ? weight : 0.0F;
    }
  }
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_ROUTING_OUT_CUH_
