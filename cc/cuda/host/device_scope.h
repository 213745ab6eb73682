// The current device of a thread, within a scope.

#ifndef JAX_SM_FREE_CC_CUDA_HOST_DEVICE_SCOPE_H_
#define JAX_SM_FREE_CC_CUDA_HOST_DEVICE_SCOPE_H_

#include <cuda_runtime_api.h>

namespace jax_sm_free::cuda {

// Returns to the caller's device when a scope ends.
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
