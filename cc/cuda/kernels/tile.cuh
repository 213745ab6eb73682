// What a block of the route reads: the experts that the tokens of a tile choose, and their ranks.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_TILE_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_TILE_CUH_

#include <cstdint>

#include "cc/config.h"
#include "cc/cuda/device_state.h"
#include "cc/routing.h"

namespace jax_sm_free::cuda {

struct Entry {
  int32_t expert = -1;  // -1 for none
  // Rank of the expert, if this is the token's first entry for that rank; else -1.
  int32_t dst = -1;
  bool bad = false;        // whether it names an expert that does not exist
  bool is_common = false;  // whether it is the first entry of a token that goes to all other ranks
};

// The tile of tokens that a block routes. Each thread has one (token, k).
class Tile {
 public:
  __device__ Tile(const Config& config, int64_t num_tokens)
      : top_k_(config.top_k), num_experts_(config.num_experts), ep_size_(config.ep_size) {
    const int32_t tile_tokens = TileTokens(config);
    first_token_ = int64_t{blockIdx.x} * tile_tokens;
    const int64_t left = num_tokens - first_token_;
    size_ = static_cast<int32_t>(left < tile_tokens ? left : tile_tokens) * top_k_;
  }

  // Reads the entry of this thread, of a token of `rank`. All threads of the block call this.
  // is_common is set only if `finds_common` is.
  __device__ Entry Read(const int32_t* topk_idx, int32_t rank, bool finds_common) const {
    __shared__ int32_t owners[kTileEntries];  // ranks that own the experts; -1 for none
    __shared__ int32_t
        num_others[kTileEntries];  // by token: the number of other ranks that it goes to
    const auto i = static_cast<int32_t>(threadIdx.x);
    Entry entry;
    if (i < size_) entry = EntryOf(topk_idx[first_token_ * top_k_ + i]);
    owners[i] = entry.dst;
    num_others[i] = 0;
    __syncthreads();
    for (int32_t before = i - i % top_k_; before < i; ++before) {
      if (owners[before] == entry.dst) entry.dst = -1;
    }
    if (!finds_common) return entry;
    if (entry.dst >= 0 && entry.dst != rank) atomicAdd(&num_others[i / top_k_], 1);
    __syncthreads();
    const bool is_first = i < size_ && i % top_k_ == 0;
    entry.is_common = is_first && num_others[i / top_k_] == ep_size_ - 1;
    return entry;
  }

  __device__ unsigned long long entry() const { return first_token_ * top_k_ + threadIdx.x; }
  __device__ int64_t token() const { return first_token_ + threadIdx.x / top_k_; }
  __device__ int64_t first_token() const { return first_token_; }
  __device__ int32_t num_tokens() const { return size_ / top_k_; }

 private:
  // The entry for an expert, as if it were the first entry of its token.
  __device__ Entry EntryOf(int32_t expert) const {
    Entry entry;
    if (expert == -1) return entry;
    entry.bad = expert < -1 || expert >= num_experts_;
    if (entry.bad) return entry;
    entry.expert = expert;
    entry.dst = OwnerRank(expert, num_experts_ / ep_size_);
    return entry;
  }

  int32_t top_k_;
  int32_t num_experts_;
  int32_t ep_size_;
  int64_t first_token_;
  int32_t size_;
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_TILE_CUH_
