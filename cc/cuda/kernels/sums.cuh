// Sums of rows by a warp: both sides of a combine.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_SUMS_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_SUMS_CUH_

#include <cstddef>
#include <cstdint>

#include "cc/cuda/kernels/claims.cuh"
#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/elements.cuh"

namespace jax_sm_free::cuda {

// The terms of a sum, one in each lane whose bit is set in `present`, added in lane order.
struct Terms {
  unsigned present = 0;
  const std::byte* row = nullptr;  // this lane's
  float weight = 1;                // this lane's
  bool poisoned = false;           // the sum is NaN; the same in all lanes
  unsigned nested = 0;             // the bit of a lane whose term is a sum itself; 0 for none
};

// terms_of(row) are the terms of a row of the result, by all lanes of a warp. Where it may say
// `nested`, terms_of.Nested(row) are those of that sum, which are weighted, and are summed and cast
// before the lane's turn.
template <typename TermsOf>
concept HasNested = requires(const TermsOf& terms_of) {
  terms_of.Nested(int64_t{0});
};

// total += weight * loaded. kWeighted false: without the weight.
template <bool kWeighted, typename T, int kWidth>
__device__ void Add(float (&total)[kWidth], const Vector<T, kWidth>& loaded, float weight) {
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    const float value = ToFloat(loaded.elements[c]);
    total[c] = __fadd_rn(total[c], kWeighted ? __fmul_rn(weight, value) : value);
  }
}

template <typename T, int kWidth>
__device__ Vector<T, kWidth> Cast(const float (&total)[kWidth], bool poisoned) {
  Vector<T, kWidth> cast;
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    cast.elements[c] = FromFloat<T>(poisoned ? __int_as_float(-1) : total[c]);
  }
  return cast;
}

// Words of a segment of a row: a few for each lane.
inline constexpr int kDirectLoads = 2;  // in flight
inline constexpr int32_t kDirectWords = kDirectLoads * kWarpSize;

// out = sum over the terms of weight * row, from zero, in float32, cast once: a segment of a row at
// a time, read from memory into registers.
template <typename T, int kWidth, bool kWeighted, typename TermsOf>
class DirectSum {
 public:
  static constexpr int kLoads = kWidth == 1 ? 1 : kDirectLoads;

  __device__ DirectSum(const Matrix& matrix, int64_t num_rows, const Warps& warps,
                       DeviceState* state, const TermsOf& terms_of)
      : segments_(matrix.row_bytes(), kDirectWords),
        // Rows that are not whole 16-byte words are one segment, of elements.
        num_vectors_(static_cast<int32_t>(kWidth == 1 ? matrix.hidden : segments_.num_words)),
        terms_of_(terms_of),
        claims_(state, segments_, num_rows, warps) {}

  // What this warp is to sum next; of no row if there is nothing.
  __device__ Claim Next() { return claims_.Next(); }

  // A segment of the row that begins at `out`.
  __device__ void Sum(const Claim& claim, std::byte* out) const {
    const Terms terms = terms_of_(claim.row);
    Terms nested;
    if constexpr (HasNested<TermsOf>) nested = terms_of_.Nested(claim.row);
    const int32_t segment = claim.segment;
    const int32_t end = kWidth == 1 ? num_vectors_ : segments_.end(segment);
    for (int32_t first = kWidth == 1 ? 0 : segments_.begin(segment); first < end;
         first += kLoads * kWarpSize) {
      Loads sums = {};
      if constexpr (HasNested<TermsOf>) sums = SumOfTerms<true>(nested, sums, first, end);
      sums = SumOfTerms<kWeighted>(terms, sums, first, end);
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int32_t i = first + u * kWarpSize + threadIdx.x % kWarpSize;
        if (i < end) reinterpret_cast<V*>(out)[i] = sums.of[u];
      }
    }
  }

 private:
  using V = Vector<T, kWidth>;
  struct Loads {
    V of[kLoads];
  };

  // Of this lane's vectors from `first` on; `nested` is what the nested term is.
  template <bool kWeigh>
  __device__ Loads SumOfTerms(const Terms& terms, const Loads& nested, int32_t first,
                              int32_t end) const {
    const int lane = threadIdx.x % kWarpSize;
    float total[kLoads][kWidth] = {};
    for (unsigned left = terms.present | terms.nested; left != 0; left &= left - 1) {
      const int source = __ffs(static_cast<int>(left)) - 1;
      if (HasNested<TermsOf> && (terms.nested >> source & 1U) != 0) {
#pragma unroll
        for (int u = 0; u < kLoads; ++u) Add<false>(total[u], nested.of[u], 1);
        continue;
      }
      const auto* row = reinterpret_cast<const V*>(ShufflePointer(terms.row, source));
      const float weight = kWeigh ? __shfl_sync(kFullWarp, terms.weight, source) : 1.0F;
      V loaded[kLoads];
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int32_t i = first + u * kWarpSize + lane;
        if (i < end) loaded[u] = row[i];
      }
#pragma unroll
      for (int u = 0; u < kLoads; ++u) Add<kWeigh>(total[u], loaded[u], weight);
    }
    Loads sums;
#pragma unroll
    for (int u = 0; u < kLoads; ++u) sums.of[u] = Cast<T>(total[u], terms.poisoned);
    return sums;
  }

  Segments segments_;
  int32_t num_vectors_;
  const TermsOf& terms_of_;
  Claims claims_;
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_SUMS_CUH_
