// The handlers of platform "CUDA". Each enqueues kernels on the stream of its call, and returns.

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cc/cuda/host/device_buffer.h"
#include "cc/cuda/ops.h"
#include "xla_ffi/handlers.h"

namespace jax_sm_free::cuda {
namespace {

// The device of a call, and the stream to enqueue on.
struct Enqueuing {
  int32_t device;
  cudaStream_t stream;
};

class CudaCall {
 public:
  using Buffer = BufferName;
  using Context = Enqueuing;
  using Result = ffi::Error;

  // Fails with an earlier fault of the buffer, if there is one.
  ffi::Error Find(Op op, BufferName name, const Enqueuing& enqueuing) {
    if (auto error = FindRank(op, *name, enqueuing.device, buffer_, rank_); error.failure()) {
      return error;
    }
    if (const std::optional<std::string> fault = buffer_->SeenFault()) {
      buffer_->Stop();
      return ffi::Error::Internal(*fault);
    }
    call_ = {.op = op, .view = &rank_->view, .stream = enqueuing.stream};
    return ffi::Error::Success();
  }
  const DeviceCall& call() const { return call_; }

  template <typename Body>
  ffi::Error Run(const Body& run) {
    run();
    const cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) return ffi::Error::Success();
    return ffi::Error::Internal(std::string("jax_sm_free: ") + OpName(call_.op) +
                                ": a kernel could not be enqueued: " + cudaGetErrorString(error));
  }
  ffi::Error Fail(ffi::Error error) { return error; }

 protected:
  const DeviceRank& rank() const { return *rank_; }

 private:
  std::shared_ptr<DeviceBuffer> buffer_;
  DeviceRank* rank_ = nullptr;
  DeviceCall call_;
};

class CudaSend : public CudaCall {
 public:
  template <typename Body>
  ffi::Error Run(const Body& run) {
    rank().mover->Wake();  // the kernels will soon give it orders
    return CudaCall::Run(run);
  }
};

struct Cuda {
  using Call = DeviceCall;
  using Send = CudaSend;
  using Recv = CudaCall;
  using Forward = CudaSend;
};

}  // namespace
}  // namespace jax_sm_free::cuda

// How XLA decodes what comes with a call.
namespace xla::ffi {

template <>
struct CtxBinding<jax_sm_free::cuda::Enqueuing> {
  using Ctx = jax_sm_free::cuda::Enqueuing;
};

template <>
struct CtxDecoding<jax_sm_free::cuda::Enqueuing> {
  using Type = jax_sm_free::cuda::Enqueuing;
  static std::optional<Type> Decode(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* context,
                                    DiagnosticEngine& diagnostic) {
    const auto device = CtxDecoding<DeviceOrdinal>::Decode(api, context, diagnostic);
    const auto stream = CtxDecoding<PlatformStream<cudaStream_t>>::Decode(api, context, diagnostic);
    if (!device || !stream) return std::nullopt;
    return Type{*device, *stream};
  }
};

}  // namespace xla::ffi

namespace jax_sm_free {

std::vector<HandlerEntry> CudaHandlers() { return HandlersOf<cuda::Cuda>(); }

}  // namespace jax_sm_free
