// Keeps the current device of a thread.

#ifndef JAX_SM_FREE_CC_CUDA_HOST_DEVICE_SCOPE_H_
#define JAX_SM_FREE_CC_CUDA_HOST_DEVICE_SCOPE_H_

#include <cuda_runtime_api.h>

namespace jax_sm_free::cuda {

// Sets the current device back, when a scope ends, to what it was at the start.
class DeviceScope {
 public:
  DeviceScope() { (void)cudaGetDevice(&device_); }
  ~DeviceScope() { (void)cudaSetDevice(device_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int device_ = 0;
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_HOST_DEVICE_SCOPE_H_
