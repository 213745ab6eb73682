// What a block of the route reads: the choices of a tile of tokens, and where they lead.

#ifndef JAX_SM_FREE_CC_CUDA_TILE_CUH_
#define JAX_SM_FREE_CC_CUDA_TILE_CUH_

#include <cstdint>

#include "cc/config.h"
#include "cc/cuda/device_state.h"
#include "cc/routing.h"

namespace jax_sm_free::cuda {

struct Entry {
  int32_t expert = -1;     // -1: none
  int32_t dst = -1;        // its rank, if this is the token's first entry for that rank, else -1
  bool bad = false;        // names an expert that there is not
  bool is_common = false;  // the first of a token that goes to all other ranks
};

// The tile of tokens that a block routes, a thread for each (token, k).
class Tile {
 public:
  __device__ Tile(const Config& config, int64_t num_tokens)
      : top_k_(config.top_k), num_experts_(config.num_experts), ep_size_(config.ep_size) {
    const int32_t tile_tokens = TileTokens(config);
    first_token_ = int64_t{blockIdx.x} * tile_tokens;
    const int64_t left = num_tokens - first_token_;
    size_ = static_cast<int32_t>(left < tile_tokens ? left : tile_tokens) * top_k_;
  }

  // This thread's entry, of tokens of `rank`. By all threads of the block. `finds_common`: what
  // says so is set.
  __device__ Entry Read(const int32_t* topk_idx, int32_t rank, bool finds_common) const {
    __shared__ int32_t experts[kTileEntries];
    __shared__ int32_t num_others[kTileEntries];  // by token: other ranks that it goes to
    const auto i = static_cast<int32_t>(threadIdx.x);
    if (i < size_) experts[i] = topk_idx[first_token_ * top_k_ + i];
    num_others[i] = 0;
    __syncthreads();
    Entry entry;
    if (i < size_) entry = EntryOf(experts, i);
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
  __device__ Entry EntryOf(const int32_t* experts, int32_t i) const {
    Entry entry;
    if (experts[i] == -1) return entry;
    entry.bad = experts[i] < -1 || experts[i] >= num_experts_;
    if (entry.bad) return entry;
    const int32_t num_local = num_experts_ / ep_size_;
    entry.expert = experts[i];
    entry.dst = OwnerRank(entry.expert, num_local);
    for (int32_t before = i - i % top_k_; before < i; ++before) {
      if (experts[before] >= 0 && OwnerRank(experts[before], num_local) == entry.dst) {
        entry.dst = -1;
        break;
      }
    }
    return entry;
  }

  int32_t top_k_;
  int32_t num_experts_;
  int32_t ep_size_;
  int64_t first_token_;
  int32_t size_;
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_TILE_CUH_
