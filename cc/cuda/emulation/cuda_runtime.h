// Stands in for CUDA's header of this name where kernels are compiled for the host: what they use
// of the language and of its functions, by fibers (fibers.h). CUDA's other headers are its own.

#ifndef JAX_SM_FREE_CC_CUDA_EMULATION_CUDA_RUNTIME_H_
#define JAX_SM_FREE_CC_CUDA_EMULATION_CUDA_RUNTIME_H_

#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cc/cuda/emulation/fibers.h"

#undef __device__
#undef __global__
#undef __host__
#undef __launch_bounds__
#undef __shared__
#define __device__
#define __global__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

// --------------------------------------------------------------------------------------- launches

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               const Args&... args) {
  jax_sm_free::cuda::emulation::Run(
      {config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes}, [&] { kernel(args...); });
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}

// --------------------------------------------------------------------------------------- meetings

inline void __syncthreads() { jax_sm_free::cuda::emulation::MeetBlock(); }
inline int __syncthreads_and(int value) {
  return jax_sm_free::cuda::emulation::AllOfBlock(value != 0) ? 1 : 0;
}
inline void __syncwarp() { jax_sm_free::cuda::emulation::MeetWarp(); }
inline void __nanosleep(unsigned) { jax_sm_free::cuda::emulation::Yield(); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

namespace jax_sm_free::cuda::emulation {

template <typename T>
T LaneValue(const uint64_t* values, unsigned lane) {
  T value;
  std::memcpy(&value, values + lane % 32, sizeof(value));
  return value;
}

// What pick(values, live lanes) makes of the values that the lanes of the warp brought.
template <typename T, typename Pick>
auto Exchange(T value, const Pick& pick) {
  uint64_t* values = WarpValues();
  std::memcpy(values + threadIdx.x % 32, &value, sizeof(value));
  MeetWarp();
  const auto picked = pick(values, LiveLanes());
  MeetWarp();
  return picked;
}

// The lanes whose values are so.
template <typename T, typename IsSo>
unsigned Lanes(T value, const IsSo& is_so) {
  return Exchange(value, [&](const uint64_t* values, unsigned live) {
    unsigned lanes = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if ((live >> lane & 1U) != 0 && is_so(LaneValue<T>(values, lane))) lanes |= 1U << lane;
    }
    return lanes;
  });
}

}  // namespace jax_sm_free::cuda::emulation

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  using namespace jax_sm_free::cuda::emulation;
  return Exchange(value, [&](const uint64_t* all, unsigned) { return LaneValue<T>(all, lane); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ bits);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return __shfl_sync(mask, value, lane < delta ? lane : lane - delta);
}
inline unsigned __ballot_sync(unsigned, bool value) {
  return jax_sm_free::cuda::emulation::Lanes(value, [](bool other) { return other; });
}
inline int __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0 ? 1 : 0; }
inline unsigned __match_any_sync(unsigned, int32_t value) {
  return jax_sm_free::cuda::emulation::Lanes(value, [&](int32_t other) { return other == value; });
}

// ---------------------------------------------------------------------------------------- atomics

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, *address + value);
}
template <typename T>
T atomicAdd_block(T* address, std::type_identity_t<T> value) {
  return atomicAdd(address, value);
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, std::max(*address, value));
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, *address | value);
}
template <typename T>
T atomicCAS_system(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return std::exchange(*address, *address == expected ? value : *address);
}

// ----------------------------------------------------------------------------- memory and numbers

template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}

inline int __popc(unsigned value) { return std::popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __int_as_float(int value) { return std::bit_cast<float>(value); }
inline float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }

// With -ffp-contract=off, as all our code: nothing is fused that does not say so.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0F / a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

using std::isnan;
template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  return a < b ? a : b;
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

#endif  // JAX_SM_FREE_CC_CUDA_EMULATION_CUDA_RUNTIME_H_
