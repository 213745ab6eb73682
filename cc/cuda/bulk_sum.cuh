// The same sums with rows on their way to shared memory ahead of their turn, by the bulk copies of
// Hopper's SMs: no register holds what is in flight, so that a few warps keep memory busy.

#ifndef JAX_SM_FREE_CC_CUDA_BULK_SUM_CUH_
#define JAX_SM_FREE_CC_CUDA_BULK_SUM_CUH_

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cc/cuda/device.cuh"
#include "cc/cuda/launch.h"
#include "cc/cuda/sums.cuh"

namespace jax_sm_free::cuda {

// Of a segment: few large pieces, because what one costs in instructions does not depend on its
// size.
inline constexpr int kBulkPerLane = 4;
inline constexpr int32_t kBulkWords = kBulkPerLane * kWarpSize;

// As DirectSum, for blocks of one warp and rows of whole 16-byte words; Sum is called for the items
// warps.index, warps.index + warps.count, ... in order, all of them. The terms of each are asked
// for twice: when its rows are sent for, and when they are added.
template <typename T, bool kWeighted, typename TermsOf>
class BulkSum {
 public:
  __device__ BulkSum(const Matrix& matrix, int64_t num_rows, const Warps& warps,
                     const TermsOf& terms_of)
      : segments_(matrix.row_bytes(), kWords),
        num_items_(num_rows * segments_.per_row),
        terms_of_(terms_of),
        num_warps_(warps.count),
        to_load_(warps.index) {
    __shared__ __align__(128) uint4 stages[kStages][kWords];
    __shared__ __align__(8) uint64_t barriers[kStages];
    stages_ = stages;
    barriers_ = barriers;
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(Barrier(stage)) : "memory");
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    FindTerms();
    for (int i = 0; i < kStages; ++i) Load();
  }

  __device__ const Segments& segments() const { return segments_; }
  __device__ int64_t num_items() const { return num_items_; }

  __device__ void Sum(int64_t item, std::byte* out) {
    const int64_t row = segments_.row_of(item);
    const int32_t segment = segments_.segment_of(item);
    const int32_t begin = segments_.begin(segment);
    const int32_t size = segments_.end(segment) - begin;
    Pieces sums = {};
    if constexpr (HasNested<TermsOf>) sums = SumOfTerms<true>(terms_of_.Nested(row), sums, size);
    sums = SumOfTerms<kWeighted>(terms_of_(row), sums, size);
#pragma unroll
    for (int u = 0; u < kPerLane; ++u) {
      const int32_t i = u * kWarpSize + threadIdx.x;
      if (i < size) reinterpret_cast<V*>(out)[begin + i] = sums.of[u];
    }
  }

 private:
  static constexpr int kStages = 4;  // as many as shared memory has room for
  static constexpr int kPerLane = kBulkPerLane;
  static constexpr int32_t kWords = kBulkWords;
  static constexpr int kWidth = sizeof(uint4) / sizeof(T);
  static constexpr int32_t kWordBytes = sizeof(uint4);
  using V = Vector<T, kWidth>;
  struct Pieces {
    V of[kPerLane];
  };

  // Of this lane's words of the segment, of `size` words; `nested` is what the nested term is.
  template <bool kWeigh>
  __device__ Pieces SumOfTerms(const Terms& terms, const Pieces& nested, int32_t size) {
    const int lane = threadIdx.x;
    float total[kPerLane][kWidth] = {};
    for (unsigned left = terms.present | terms.nested; left != 0; left &= left - 1) {
      const int source = __ffs(static_cast<int>(left)) - 1;
      if (HasNested<TermsOf> && (terms.nested >> source & 1U) != 0) {
#pragma unroll
        for (int u = 0; u < kPerLane; ++u) Add<false>(total[u], nested.of[u], 1);
        continue;
      }
      const float weight = kWeigh ? __shfl_sync(kFullWarp, terms.weight, source) : 1.0F;
      Await(add_stage_);
      const uint4* words = stages_[add_stage_];
#pragma unroll
      for (int u = 0; u < kPerLane; ++u) {
        const int32_t i = u * kWarpSize + lane;
        // Whole words, which the compiler would else load element by element, in four-fold
        // conflict.
        if (i < size) Add<kWeigh>(total[u], std::bit_cast<V>(words[i]), weight);
      }
      __syncwarp();  // all have read the stage that is loaded next
      Load();
      add_stage_ = (add_stage_ + 1) % kStages;
    }
    Pieces sums;
#pragma unroll
    for (int u = 0; u < kPerLane; ++u) sums.of[u] = Cast<T>(total[u], terms.poisoned);
    return sums;
  }

  __device__ static uint32_t Shared(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
  }
  __device__ uint32_t Barrier(int stage) const { return Shared(barriers_ + stage); }

  __device__ Terms TermsToLoad() const {
    const int64_t row = segments_.row_of(to_load_);
    if constexpr (HasNested<TermsOf>) {
      if (loads_nested_) return terms_of_.Nested(row);
    }
    return terms_of_(row);
  }
  __device__ void Advance() {
    if (!loads_nested_) to_load_ += num_warps_;
    loads_nested_ = HasNested<TermsOf> && !loads_nested_;
  }

  // The next terms that there are to load, and which bytes of their rows.
  __device__ void FindTerms() {
    for (; to_load_ < num_items_; Advance()) {
      loading_ = TermsToLoad();
      if (loading_.present == 0) continue;
      const int32_t segment = segments_.segment_of(to_load_);
      const int32_t begin = segments_.begin(segment);
      if (loading_.row != nullptr) loading_.row += begin * kWordBytes;
      load_bytes_ = (segments_.end(segment) - begin) * kWordBytes;
      return;
    }
  }

  // Sends for the next term.
  __device__ void Load() {
    if (to_load_ >= num_items_) return;
    const std::byte* row =
        ShufflePointer(loading_.row, __ffs(static_cast<int>(loading_.present)) - 1);
    if (threadIdx.x == 0) {
      asm volatile(
          "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(Barrier(load_stage_)),
          "r"(load_bytes_)
          : "memory");
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
          "[%3];" ::"r"(Shared(stages_[load_stage_])),
          "l"(row), "r"(load_bytes_), "r"(Barrier(load_stage_))
          : "memory");
    }
    load_stage_ = (load_stage_ + 1) % kStages;
    loading_.present &= loading_.present - 1;
    if (loading_.present != 0) return;
    Advance();
    FindTerms();
  }

  __device__ void Await(int stage) {
    uint32_t done = 0;
    while (done == 0) {
      asm volatile(
          "{\n"
          ".reg .pred p;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n"
          "}"
          : "=r"(done)
          : "r"(Barrier(stage)), "r"(phases_ >> stage & 1U)
          : "memory");
    }
    phases_ ^= 1U << stage;
  }

  Segments segments_;
  int64_t num_items_;
  const TermsOf& terms_of_;
  int64_t num_warps_;
  uint4 (*stages_)[kWords];
  uint64_t* barriers_;
  uint32_t phases_ = 0;  // a bit for each stage: the parity that its load completes
  int load_stage_ = 0;
  int add_stage_ = 0;
  int64_t to_load_;  // item
  bool loads_nested_ = HasNested<TermsOf>;
  Terms loading_;  // those of its terms that are still to be sent for
  int32_t load_bytes_;
};

#if !defined(__CUDACC__) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900)
inline constexpr bool kHasBulkCopies = false;  // code that is there, but never launched
#else
inline constexpr bool kHasBulkCopies = true;
#endif

// The sum that a kernel uses.
template <typename T, int kWidth, bool kWeighted, bool kBulk, typename TermsOf>
using SumOf = std::conditional_t<kBulk && kHasBulkCopies, BulkSum<T, kWeighted, TermsOf>,
                                 DirectSum<T, kWidth, kWeighted, TermsOf>>;

// Threads of its blocks, how many blocks an SM should have room for at least, and words of a
// segment.
template <bool kBulk>
inline constexpr int kSumThreads = kBulk ? kWarpSize : kRowThreads;
template <bool kBulk>
inline constexpr int kSumBlocks = kBulk ? 1 : 4;
template <bool kBulk>
inline constexpr int32_t kSumWords = kBulk ? kBulkWords : kDirectWords;

// Rows for which it pays, on a device that can.
inline bool GoesInBulk(const Matrix& matrix) {
  constexpr int64_t kLeastBytes = 1024;
  static const bool has_bulk_copies = IsHopperOrNewer();
  return has_bulk_copies && matrix.row_bytes() % 16 == 0 && matrix.row_bytes() >= kLeastBytes;
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_BULK_SUM_CUH_
