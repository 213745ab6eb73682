#include "cc/cuda/processes/gpu_id.h"

#include <cuda_runtime_api.h>

#include <cstring>

namespace jax_sm_free::cuda {

std::optional<GpuId> GpuIdOf(int device) {
  cudaDeviceProp properties{};
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) return std::nullopt;
  GpuId id;
  static_assert(sizeof(id) == sizeof(properties.uuid.bytes));
  std::memcpy(id.data(), properties.uuid.bytes, sizeof(id));
  return id;
}

bool IsVisible(const GpuId& id) {
  int num_visible = 0;
  (void)cudaGetDeviceCount(&num_visible);
  for (int device = 0; device < num_visible; ++device) {
    if (GpuIdOf(device) == id) return true;
  }
  return false;
}

}  // namespace jax_sm_free::cuda
