#include "xla_ffi/cuda_stub.h"

#include "xla/ffi/api/ffi.h"
#include "xla_ffi/handler_entry.h"

namespace jax_sm_free {
namespace {

namespace ffi = xla::ffi;

ffi::Error WithoutCuda(ffi::RemainingArgs /*args*/, ffi::RemainingRets /*results*/) {
  return ffi::Error(ffi::ErrorCode::kUnimplemented,
                    "jax_sm_free: expected a build with CUDA to run on a GPU, but this one was "
                    "built without CUDA");
}

XLA_FFI_DEFINE_HANDLER(kWithoutCuda, WithoutCuda, ffi::Ffi::Bind().RemainingArgs().RemainingRets());

}  // namespace

std::vector<HandlerEntry> CudaStubHandlers() {
  std::vector<HandlerEntry> handlers = CpuHandlers();
  for (HandlerEntry& entry : handlers) entry = {entry.target, nullptr, kWithoutCuda};
  return handlers;
}

}  // namespace jax_sm_free
