#include "xla_ffi/cpu_call.h"

#include <memory>
#include <utility>

#include "cc/cpu/host_buffer.h"
#include "xla_ffi/decode.h"

namespace jax_sm_free {

ffi::Error Locate(Op op, std::string_view name, int32_t device, ffi::RunId run, HostCall& call) {
  std::shared_ptr<HostBuffer> buffer;
  if (auto error = FindBuffer(op, name, buffer); error.failure()) return error;
  HostRank* rank = buffer->RankOf(device);
  if (rank == nullptr) return IsOutside(op, buffer->id(), device);
  call = {op, std::move(buffer), rank, run.run_id};
  return ffi::Error::Success();
}

ffi::Error ToError(const std::optional<Fault>& fault) {
  return fault ? ffi::Error::Internal(fault->Describe()) : ffi::Error::Success();
}

}  // namespace jax_sm_free
