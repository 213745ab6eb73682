// Sums of rows, each computed by a warp. Both sides of a combine use them.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_SUMS_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_SUMS_CUH_

#include <cstddef>
#include <cstdint>

#include "cc/cuda/kernels/claims.cuh"
#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/elements.cuh"

namespace jax_sm_free::cuda {

// The terms of a sum. Each lane whose bit is set in `present` has one, and they are added in the
// order of lanes.
struct Terms {
  unsigned present = 0;
  const std::byte* row = nullptr;  // of this lane
  float weight = 1;                // of this lane
  bool poisoned = false;           // the sum is NaN; equal in all lanes
  unsigned nested = 0;             // the bit of the lane whose term is a sum of its own; 0 for none
};

// terms_of(row) returns the terms of a row of the result. All lanes of a warp call it. If it may
// set `nested`, terms_of.Nested(row) returns the terms of the nested sum. These are weighted, and
// their sum is computed and cast before it is added.
template <typename TermsOf>
concept HasNested = requires(const TermsOf& terms_of) {
  terms_of.Nested(int64_t{0});
};

// total += weight * loaded; without the weight if kWeighted is false.
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

// Words of a segment of a row. Each lane has a few.
inline constexpr int kDirectLoads = 2;  // in flight
inline constexpr int32_t kDirectWords = kDirectLoads * kWarpSize;

// out = the sum over the terms of weight * row. It starts from zero, is computed in float32, and is
// cast once. It reads a segment of a row from memory into registers at a time.
template <typename T, int kWidth, bool kWeighted, typename TermsOf>
class DirectSum {
 public:
  static constexpr int kLoads = kWidth == 1 ? 1 : kDirectLoads;

  __device__ DirectSum(const Matrix& matrix, int64_t num_rows, const Warps& warps,
                       DeviceState* state, const TermsOf& terms_of)
      : segments_(matrix.row_bytes(), kDirectWords),
        // A row that is not a multiple of 16 bytes is one segment, counted in elements.
        num_vectors_(static_cast<int32_t>(kWidth == 1 ? matrix.hidden : segments_.num_words)),
        terms_of_(terms_of),
        claims_(state, segments_, num_rows, warps) {}

  // The segment that this warp sums next; a row behind the last one if there is none.
  __device__ Claim Next() { return claims_.Next(); }

  // Sums a segment of a row. The row begins at `out`.
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

  // The sum for this lane's vectors from `first` on. `nested` is the value of the nested term.
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
