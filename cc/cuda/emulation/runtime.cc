// The functions of CUDA's runtime that launchers call, for a GPU of a few SMs. It is older than
// Hopper, unless the environment has EMULATE_HOPPER.

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  static const int major = std::getenv("EMULATE_HOPPER") != nullptr ? 9 : 8;
  *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : major;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t /*stream*/) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
