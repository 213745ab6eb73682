#include "xla_ffi/cpu_call.h"

#include <memory>
#include <utility>

#include "cc/cpu/host_buffer.h"
#include "cc/runtime.h"
#include "xla_ffi/decode.h"

namespace jax_sm_free {

ffi::Error Locate(Op op, int64_t buffer_id, int32_t device, ffi::RunId run, HostCall& call) {
  auto buffer = std::dynamic_pointer_cast<HostBuffer>(Registry::Get().Find(buffer_id));
  if (buffer == nullptr) return IsClosed(op, buffer_id);
  HostRank* rank = buffer->RankOf(device);
  if (rank == nullptr) return IsOutside(op, buffer_id, device);
  call = {op, std::move(buffer), rank, run.run_id};
  return ffi::Error::Success();
}

ffi::Error ToError(const std::optional<Fault>& fault) {
  return fault ? ffi::Error::Internal(fault->Describe()) : ffi::Error::Success();
}

}  // namespace jax_sm_free
