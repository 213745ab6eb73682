#include "cc/cuda/processes/visible_gpus.h"

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <string>

namespace jax_sm_free::cuda {
namespace {

bool IsVisible(const GpuId& id) {
  int num_visible = 0;
  (void)cudaGetDeviceCount(&num_visible);
  for (int device = 0; device < num_visible; ++device) {
    if (GpuIdOf(device) == id) return true;
  }
  return false;
}

}  // namespace

std::optional<GpuId> GpuIdOf(int device) {
  cudaDeviceProp properties{};
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) return std::nullopt;
  GpuId id;
  static_assert(sizeof(id) == sizeof(properties.uuid.bytes));
  std::memcpy(id.data(), properties.uuid.bytes, sizeof(id));
  return id;
}

void WarnOfHiddenGpus(const Rendezvous& rendezvous) {
  std::string hidden;
  for (const int32_t process : rendezvous.processes().of_rank) {
    if (IsVisible(rendezvous.GpuOf(process)) || !rendezvous.OnThisHost(process)) continue;
    hidden += (hidden.empty() ? "" : ", ") + std::to_string(process);
  }
  if (hidden.empty()) return;
  rendezvous.processes().warn(
      "the GPUs of processes " + hidden +
      " of the mesh are hidden from this one, probably by CUDA_VISIBLE_DEVICES: CUDA then copies "
      "to them with SMs, not with copy engines, which slows what computes meanwhile. Let each "
      "process see all GPUs of its host, and choose its own with local_device_ids of "
      "jax.distributed.initialize.");
}

}  // namespace jax_sm_free::cuda
