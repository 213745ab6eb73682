#include "xla_ffi/cuda_call.h"

#include <optional>
#include <string>
#include <utility>

#include "xla_ffi/decode.h"

namespace jax_sm_free::cuda {

ffi::Error Locate(Op op, std::string_view name, int32_t device, Call& call) {
  std::shared_ptr<DeviceBuffer> buffer;
  if (auto error = FindBuffer(op, name, buffer); error.failure()) return error;
  DeviceRank* rank = buffer->RankOf(device);
  if (rank == nullptr) return IsOutside(op, buffer->id(), device);
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
