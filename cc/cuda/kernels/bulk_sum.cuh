// The sums of sums.cuh, for which bulk copies (bulk_copy.cuh) load rows into shared memory ahead of
// their use. No register holds data that is in flight, so a few warps keep memory busy.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_BULK_SUM_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_BULK_SUM_CUH_

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cc/cuda/kernels/bulk_copy.cuh"
#include "cc/cuda/kernels/claims.cuh"
#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/launch.h"
#include "cc/cuda/kernels/sums.cuh"

namespace jax_sm_free::cuda {

// Words of a lane in a segment. Pieces are few and large, because the number of instructions for a
// piece does not depend on its size.
inline constexpr int kBulkPerLane = 4;
inline constexpr int32_t kBulkWords = kBulkPerLane * kWarpSize;

// Does what DirectSum does, for blocks of one warp and rows of whole 16-byte words. The terms of a
// sum are found when their rows are requested, and kept beside the rows until they are added.
template <typename T, bool kWeighted, typename TermsOf>
class BulkSum {
 public:
  __device__ BulkSum(const Matrix& matrix, int64_t num_rows, const Warps& warps, DeviceState* state,
                     const TermsOf& terms_of)
      : segments_(matrix.row_bytes(), kWords),
        num_rows_(static_cast<int32_t>(num_rows)),
        terms_of_(terms_of),
        claims_(state, segments_, num_rows, warps) {
    __shared__ __align__(128) uint4 words[kStages][kWords];
    __shared__ __align__(8) uint64_t barriers[kStages];
    __shared__ Note notes[kStages];
    words_ = words;
    barriers_ = barriers;
    notes_ = notes;
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) InitBarrier(barriers_ + stage);
      FenceBarriers();
    }
    __syncwarp();
    Load();
  }

  // As in DirectSum. Call it once before each Sum. It waits for the first stage of that sum.
  __device__ Claim Next() {
    if (num_loaded_ == 0) return {num_rows_, 0};
    Await(add_stage_);
    return notes_[add_stage_].claim;
  }

  __device__ void Sum(const Claim& claim, std::byte* out) {
    const int32_t begin = segments_.begin(claim.segment);
    const int32_t size = segments_.end(claim.segment) - begin;
    Pieces sums = {};
    if constexpr (HasNested<TermsOf>) {
      sums = SumOfTerms<true>(sums, size);
      Await(add_stage_);
    }
    sums = SumOfTerms<kWeighted>(sums, size);
#pragma unroll
    for (int u = 0; u < kPerLane; ++u) {
      const int32_t i = u * kWarpSize + threadIdx.x;
      if (i < size) reinterpret_cast<V*>(out)[begin + i] = sums.of[u];
    }
  }

 private:
  static constexpr int kStages = 4;  // as many as fit into shared memory
  static constexpr int kPerLane = kBulkPerLane;
  static constexpr int32_t kWords = kBulkWords;
  static constexpr int kWidth = sizeof(uint4) / sizeof(T);
  static constexpr int32_t kWordBytes = sizeof(uint4);
  using V = Vector<T, kWidth>;
  struct Pieces {
    V of[kPerLane];
  };
  // What a stage holds: a row of a sum. A sum without rows has a stage, too.
  enum What : uint32_t { kRow = 1, kNestedFirst = 2, kNestedLast = 4, kEnds = 8, kPoisoned = 16 };
  struct alignas(16) Note {
    Claim claim;
    float weight;
    uint32_t what;
  };

  // The sum of this lane's words of a segment of `size` words. `nested` is the value of the nested
  // term. The first stage must have arrived.
  template <bool kWeigh>
  __device__ Pieces SumOfTerms(const Pieces& nested, int32_t size) {
    const int lane = threadIdx.x;
    float total[kPerLane][kWidth] = {};
    uint32_t what = 0;
    while (true) {
      what = notes_[add_stage_].what;
      const float weight = kWeigh ? notes_[add_stage_].weight : 1.0F;
      if (HasNested<TermsOf> && (what & kNestedFirst) != 0) {
#pragma unroll
        for (int u = 0; u < kPerLane; ++u) Add<false>(total[u], nested.of[u], 1);
      }
      if ((what & kRow) != 0) {
        const uint4* words = words_[add_stage_];
#pragma unroll
        for (int u = 0; u < kPerLane; ++u) {
          const int32_t i = u * kWarpSize + lane;
          // Loads whole words. Otherwise the compiler would load element by element, with four-fold
          // bank conflicts.
          if (i < size) Add<kWeigh>(total[u], std::bit_cast<V>(words[i]), weight);
        }
      }
      if (HasNested<TermsOf> && (what & kNestedLast) != 0) {
#pragma unroll
        for (int u = 0; u < kPerLane; ++u) Add<false>(total[u], nested.of[u], 1);
      }
      __syncwarp();  // all lanes have read the stage that is loaded next
      add_stage_ = (add_stage_ + 1) % kStages;
      --num_loaded_;
      Load();
      if ((what & kEnds) != 0) break;
      Await(add_stage_);
    }
    Pieces sums;
#pragma unroll
    for (int u = 0; u < kPerLane; ++u) sums.of[u] = Cast<T>(total[u], (what & kPoisoned) != 0);
    return sums;
  }

  // Finds the terms of the next sum. If a claim has a nested sum, that sum comes first.
  __device__ void FindTerms() {
    if (!found_nested_) loading_ = claims_.Next();
    if (loading_.row >= num_rows_) return;
    if constexpr (HasNested<TermsOf>) {
      found_nested_ = !found_nested_;
      terms_ = found_nested_ ? terms_of_.Nested(loading_.row) : terms_of_(loading_.row);
    } else {
      terms_ = terms_of_(loading_.row);
    }
    has_terms_ = true;
    left_ = terms_.present;
    const int32_t begin = segments_.begin(loading_.segment);
    load_bytes_ = (segments_.end(loading_.segment) - begin) * kWordBytes;
    if (terms_.row != nullptr) terms_.row += begin * kWordBytes;
  }

  // Requests terms as long as there are free stages.
  __device__ void Load() {
    while (loading_.row < num_rows_) {
      if (!has_terms_) {
        FindTerms();
      } else if (num_loaded_ < kStages) {
        LoadTerm();
      } else {
        return;
      }
    }
  }

  // Requests the next term. The lane that has the term does so.
  __device__ void LoadTerm() {
    const int source = left_ == 0 ? 0 : __ffs(static_cast<int>(left_)) - 1;
    left_ &= left_ - 1;
    has_terms_ = left_ != 0;
    const bool nested_first = (terms_.nested & ((1U << source) - 1)) != 0;
    if (nested_first) terms_.nested = 0;
    uint64_t* barrier = barriers_ + load_stage_;
    if (threadIdx.x == source) {
      const bool has_row = terms_.present != 0;
      const bool nested_last = !has_terms_ && terms_.nested != 0;
      notes_[load_stage_] = {loading_, terms_.weight,
                             (has_row ? kRow : 0U) | (nested_first ? kNestedFirst : 0U) |
                                 (nested_last ? kNestedLast : 0U) | (has_terms_ ? 0U : kEnds) |
                                 (terms_.poisoned ? kPoisoned : 0U)};
      Expect(barrier, has_row ? load_bytes_ : 0);
      if (has_row) BulkCopy(words_[load_stage_], terms_.row, load_bytes_, barrier);
    }
    load_stage_ = (load_stage_ + 1) % kStages;
    ++num_loaded_;
  }

  __device__ void Await(int stage) {
    AwaitPhase(barriers_ + stage, phases_ >> stage & 1U);
    phases_ ^= 1U << stage;
  }

  Segments segments_;
  int32_t num_rows_;
  const TermsOf& terms_of_;
  Claims claims_;
  uint4 (*words_)[kWords];
  uint64_t* barriers_;
  Note* notes_;
  uint32_t phases_ = 0;  // one bit for each stage: the parity of the phase that its load completes
  int load_stage_ = 0;
  int add_stage_ = 0;
  int num_loaded_ = 0;  // stages in use
  // Describes the sum whose terms are being requested.
  Claim loading_ = {-1, 0};
  bool found_nested_ = false;
  bool has_terms_ = false;  // whether some terms were not requested yet
  Terms terms_;
  unsigned left_;
  int32_t load_bytes_;
};

// The class that computes the sums of a kernel.
template <typename T, int kWidth, bool kWeighted, bool kBulk, typename TermsOf>
using SumOf = std::conditional_t<kBulk && kHasBulkCopies, BulkSum<T, kWeighted, TermsOf>,
                                 DirectSum<T, kWidth, kWeighted, TermsOf>>;

// The number of threads of its blocks, the least number of blocks that an SM should have room for,
// and the number of words of a segment.
template <bool kBulk>
inline constexpr int kSumThreads = kBulk ? kWarpSize : kRowThreads;
template <bool kBulk>
inline constexpr int kSumBlocks = kBulk ? 16 : 4;
template <bool kBulk>
inline constexpr int32_t kSumWords = kBulk ? kBulkWords : kDirectWords;

// Whether bulk copies are faster for these rows, and the device has them.
inline bool GoesInBulk(const Matrix& matrix) {
  constexpr int64_t kLeastBytes = 1024;
  static const bool has_bulk_copies = IsHopperOrNewer();
  return has_bulk_copies && matrix.row_bytes() % 16 == 0 && matrix.row_bytes() >= kLeastBytes;
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_BULK_SUM_CUH_
