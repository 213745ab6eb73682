#include "xla_ffi/cuda_call.h"

#include <optional>
#include <string>
#include <utility>

#include "cc/runtime.h"
#include "xla_ffi/decode.h"

namespace jax_sm_free::cuda {

ffi::Error Locate(Op op, int64_t buffer_id, int32_t device, Call& call) {
  auto buffer = std::dynamic_pointer_cast<DeviceBuffer>(Registry::Get().Find(buffer_id));
  if (buffer == nullptr) return IsClosed(op, buffer_id);
  DeviceRank* rank = buffer->RankOf(device);
  if (rank == nullptr) return IsOutside(op, buffer_id, device);
  if (const std::optional<std::string> fault = buffer->SeenFault()) {
    buffer->Stop();
    return ffi::Error::Internal(*fault);
  }
  call = {OpName(op), std::move(buffer), rank};
  return ffi::Error::Success();
}

ffi::Error Enqueued(const Call& call) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_sm_free: ") + call.name +
                              ": a kernel could not be enqueued: " + cudaGetErrorString(error));
}

}  // namespace jax_sm_free::cuda
