// What the lanes of a warp do together: their share of the rows, and copies of rows in the widest
// words that fit.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_WARP_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_WARP_CUH_

#include <cstddef>
#include <cstdint>

namespace jax_sm_free::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullWarp = 0xFFFFFFFFU;

// The number of this warp in the grid, and the number of warps in the grid.
struct Warps {
  int64_t index;
  int64_t count;
};
__device__ inline Warps WarpsOfGrid() {
  const int64_t per_block = blockDim.x / kWarpSize;
  return {blockIdx.x * per_block + threadIdx.x / kWarpSize, gridDim.x * per_block};
}

// Divides a row into segments of at most `max_words` whole 16-byte words. Each warp takes one
// segment at a time, so that many warps share few rows evenly. A row whose size is not a multiple
// of 16 bytes is one segment.
struct Segments {
  int32_t num_words;
  int32_t per_row;
  int32_t words;  // of each segment except the last

  __host__ __device__ Segments(int64_t row_bytes, int32_t max_words) {
    const bool wide = row_bytes % 16 == 0;
    num_words = static_cast<int32_t>(row_bytes / 16);
    per_row = wide && num_words > 0 ? (num_words + max_words - 1) / max_words : 1;
    words = (num_words + per_row - 1) / per_row;
  }

  __device__ int32_t begin(int32_t segment) const { return segment * words; }
  __device__ int32_t end(int32_t segment) const {
    return segment + 1 == per_row ? num_words : (segment + 1) * words;
  }
};

// The pointer in another lane of the warp.
template <typename T>
__device__ inline T* ShufflePointer(T* pointer, int lane) {
  return reinterpret_cast<T*>(
      __shfl_sync(kFullWarp, reinterpret_cast<unsigned long long>(pointer), lane));
}

// Copies words [first, end) of a row, of 16 bytes each, to the out_row of every lane that has one.
// All lanes of the warp call it. It reads each word once, and each lane keeps several loads in
// flight.
inline constexpr int kCopyUnroll = 8;
inline constexpr int32_t kCopyWords = kCopyUnroll * kWarpSize;  // of a segment
__device__ inline void WarpCopyToAll(std::byte* out_row, const std::byte* row, int32_t first,
                                     int32_t end) {
  constexpr int kUnroll = kCopyUnroll;
  const int lane = threadIdx.x % kWarpSize;
  const unsigned present = __ballot_sync(kFullWarp, out_row != nullptr);
  if (present == 0) return;
  const auto* source = reinterpret_cast<const uint4*>(row) + lane;
  for (; first < end; first += kUnroll * kWarpSize) {
    uint4 words[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int32_t i = first + u * kWarpSize;
      if (i + lane < end) words[u] = __ldcs(source + i);
    }
    for (unsigned left = present; left != 0; left &= left - 1) {
      const int from = __ffs(static_cast<int>(left)) - 1;
      auto* out = reinterpret_cast<uint4*>(ShufflePointer(out_row, from)) + lane;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int32_t i = first + u * kWarpSize;
        if (i + lane < end) __stcs(out + i, words[u]);
      }
    }
  }
}

// Copies `bytes` with all lanes of a warp, in the widest words that the addresses allow.
__device__ inline void WarpCopy(std::byte* out, const std::byte* in, int64_t bytes) {
  const int lane = threadIdx.x % kWarpSize;
  const auto all = reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(in) |
                   static_cast<uintptr_t>(bytes);
  if (all % sizeof(uint4) == 0) {
    WarpCopyToAll(lane == 0 ? out : nullptr, in, 0, static_cast<int32_t>(bytes / sizeof(uint4)));
  } else if (all % sizeof(uint32_t) == 0) {
    for (int64_t i = lane; i < bytes / 4; i += kWarpSize) {
      reinterpret_cast<uint32_t*>(out)[i] = reinterpret_cast<const uint32_t*>(in)[i];
    }
  } else {
    for (int64_t i = lane; i < bytes; i += kWarpSize) out[i] = in[i];
  }
}

// Sets `bytes` bytes to one value with all lanes of a warp.
__device__ inline void WarpFill(std::byte* out, uint8_t value, int64_t bytes) {
  const int lane = threadIdx.x % kWarpSize;
  const uint32_t word = value * 0x01010101U;
  if ((reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(bytes)) % sizeof(uint4) == 0) {
    const uint4 wide = make_uint4(word, word, word, word);
    for (int64_t i = lane; i < bytes / 16; i += kWarpSize) reinterpret_cast<uint4*>(out)[i] = wide;
  } else {
    for (int64_t i = lane; i < bytes; i += kWarpSize) out[i] = static_cast<std::byte>(value);
  }
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_WARP_CUH_
