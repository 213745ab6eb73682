#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>

#include "cc/cuda/kernel_tests/memory.h"

namespace jax_sm_free::cuda::kernel_tests {
namespace {

void MustSucceed(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::abort();
}

}  // namespace

void* AllocateForKernels(size_t bytes) {
  void* memory = nullptr;
  if (bytes > 0) MustSucceed(cudaMallocManaged(&memory, bytes, cudaMemAttachGlobal), "allocation");
  return memory;
}

void FreeForKernels(void* memory) { MustSucceed(cudaFree(memory), "free"); }

void AwaitKernels() {
  MustSucceed(cudaGetLastError(), "launch of a kernel");
  MustSucceed(cudaDeviceSynchronize(), "kernel");
}

}  // namespace jax_sm_free::cuda::kernel_tests
