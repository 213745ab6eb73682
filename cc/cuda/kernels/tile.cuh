// What a block of the route reads: the experts that the tokens of a tile choose, and their ranks.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_TILE_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_TILE_CUH_

#include <cstdint>

#include "cc/config.h"
#include "cc/cuda/device_state.h"
#include "cc/cuda/rank_view.h"
#include "cc/routing.h"
#include "cc/tiers.h"

namespace jax_sm_free::cuda {

struct Entry {
  int32_t expert = -1;  // its key; -1 for none
  int32_t lane = -1;    // of the message to the expert
  int32_t local = -1;   // the number of the expert in this message
  // The lane, if this is the token's first entry for it; else -1.
  int32_t dst = -1;
  bool bad = false;        // whether it names an expert that does not exist
  bool is_common = false;  // whether it is the first entry of a token that goes to all other ranks
};

// Finds the messages of tokens by their experts, in one tier: the lane of an expert is the rank
// that owns it, and its key is the expert itself.
class FlatRouter {
 public:
  __device__ explicit FlatRouter(const RankView& view)
      : FlatRouter(view.config.num_experts, view.config.num_local_experts()) {}

  __device__ int32_t num_experts() const { return num_experts_; }
  __device__ int32_t KeyOf(int32_t expert) const { return expert; }
  __device__ Entry OfKey(int32_t key) const {
    return {key, OwnerRank(key, num_local_), LocalExpert(key, num_local_)};
  }

 protected:
  __device__ FlatRouter(int32_t num_experts, int32_t num_local)
      : num_experts_(num_experts), num_local_(num_local) {}

 private:
  int32_t num_experts_;
  int32_t num_local_;
};

// The same in two tiers. Keys are experts, sorted by node. An expert of another node is numbered
// by node.
class TierRouter {
 public:
  __device__ explicit TierRouter(const RankView& view)
      : config_(view.config),
        node_(NodeOf(view.config, view.rank)),
        node_size_(view.config.node_size()),
        num_local_(view.config.num_local_experts()) {}

  __device__ int32_t num_experts() const { return config_.num_experts; }
  __device__ int32_t KeyOf(int32_t expert) const { return SortedByNode(config_, expert); }
  __device__ Entry OfKey(int32_t key) const {
    const int32_t node_experts = node_size_ * num_local_;
    const int32_t node = key / node_experts;
    const int32_t in_node = key % node_experts;
    if (node != node_) return {key, node_size_ + AmongOthers(node_, node), in_node};
    return {key, OwnerRank(in_node, num_local_), LocalExpert(in_node, num_local_)};
  }

 private:
  const Config& config_;
  int32_t node_;
  int32_t node_size_;
  int32_t num_local_;
};

// The same for the node experts of a rail message: the lane of an expert is the place of its rank.
class PlaceRouter : public FlatRouter {
 public:
  __device__ explicit PlaceRouter(const RankView& view)
      : FlatRouter(view.config.node_size() * view.config.num_local_experts(),
                   view.config.num_local_experts()) {}
};

// A tile of tokens, which a block routes. Each thread has one (token, k).
class Tile {
 public:
  __device__ Tile(const RankView& view, int64_t num_tokens, int32_t index)
      : top_k_(view.config.top_k), num_others_(view.config.ep_size - 1) {
    first_token_ = int64_t{index} * view.tile_tokens;
    const int64_t left = num_tokens - first_token_;
    const int64_t tokens = left < view.tile_tokens ? left : view.tile_tokens;
    size_ = tokens > 0 ? static_cast<int32_t>(tokens) * top_k_ : 0;
  }

  // Reads the entry of this thread, of a token of `rank`. All threads of the block call this.
  // is_common is set only if `finds_common` is.
  template <typename Router>
  __device__ Entry Read(const int32_t* topk_idx, const Router& router, int32_t rank,
                        bool finds_common) const {
    __shared__ int32_t lanes[kTileEntries];  // of the experts; -1 for none
    __shared__ int32_t
        num_others[kTileEntries];  // by token: the number of other ranks that it goes to
    const auto i = static_cast<int32_t>(threadIdx.x);
    Entry entry;
    if (i < size_) entry = EntryOf(router, topk_idx[first_token_ * top_k_ + i]);
    lanes[i] = entry.lane;
    num_others[i] = 0;
    __syncthreads();
    entry.dst = entry.lane;
    for (int32_t before = i - i % top_k_; before < i; ++before) {
      if (lanes[before] == entry.dst) entry.dst = -1;
    }
    if (!finds_common) return entry;
    if (entry.dst >= 0 && entry.dst != rank) atomicAdd(&num_others[i / top_k_], 1);
    __syncthreads();
    const bool is_first = i < size_ && i % top_k_ == 0;
    entry.is_common = is_first && num_others[i / top_k_] == num_others_;
    return entry;
  }

  __device__ unsigned long long entry() const { return first_token_ * top_k_ + threadIdx.x; }
  __device__ int64_t token() const { return first_token_ + threadIdx.x / top_k_; }
  __device__ int64_t first_token() const { return first_token_; }
  __device__ int32_t num_tokens() const { return size_ / top_k_; }

 private:
  template <typename Router>
  __device__ static Entry EntryOf(const Router& router, int32_t expert) {
    Entry entry;
    if (expert == -1) return entry;
    entry.bad = expert < -1 || expert >= router.num_experts();
    return entry.bad ? entry : router.OfKey(router.KeyOf(expert));
  }

  int32_t top_k_;
  int32_t num_others_;
  int64_t first_token_;
  int32_t size_;
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_TILE_CUH_
