// The handlers of platform "cpu". A send has a state, which knows its buffer. A recv ends when its
// messages have arrived, on the thread that finds out.

#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "cc/cpu/host_buffer.h"
#include "cc/cpu/ops.h"
#include "cc/fault.h"
#include "xla_ffi/handlers.h"
#include "xla_ffi/send_site.h"

namespace jax_sm_free {
namespace {

// The run and the device of a call.
struct Running {
  int64_t run;
  int32_t device;
};

ffi::Error ToError(const std::optional<Fault>& fault) {
  return fault ? ffi::Error::Internal(fault->Describe()) : ffi::Error::Success();
}

// Finds the buffer and the rank of a call.
ffi::Error Locate(Op op, std::string_view name, const Running& running, HostCall& call) {
  call.op = op;
  call.run = running.run;
  return FindRank(op, name, running.device, call.buffer, call.rank);
}

class CpuSend {
 public:
  using Buffer = SendSite*;
  using Context = Running;
  using Result = ffi::Error;

  ffi::Error Find(Op op, SendSite* site, const Running& running) {
    if (auto error = Locate(op, site->buffer, running, call_); error.failure()) return error;
    call_.call_site = site->number;
    if (site->copy == nullptr) return ffi::Error::Success();
    call_.site = site->copy->Site();
    call_.call_site = call_.site->number;
    return ffi::Error::Success();
  }
  const HostCall& call() const { return call_; }

  template <typename Body>
  ffi::Error Run(const Body& run) {
    return ToError(run());
  }
  ffi::Error Fail(ffi::Error error) { return error; }

 private:
  HostCall call_;
};

// XLA keeps operands and results until the future is ready, but does not keep their shapes.
class CpuRecv {
 public:
  using Buffer = BufferName;
  using Context = Running;
  using Result = ffi::Future;

  ffi::Error Find(Op op, BufferName buffer, const Running& running) {
    if (auto error = Locate(op, *buffer, running, call_); error.failure()) return error;
    call_.done = [promise = promise_](const std::optional<Fault>& fault) mutable {
      fault ? promise.SetError(ToError(fault)) : promise.SetAvailable();
    };
    return ffi::Error::Success();
  }
  const HostCall& call() const { return call_; }

  template <typename Body>
  ffi::Future Run(const Body& run) {
    ffi::Future future(promise_);
    run();
    return future;
  }
  ffi::Future Fail(ffi::Error error) {
    ffi::Future future(promise_);
    promise_.SetError(std::move(error));
    return future;
  }

 private:
  ffi::Promise promise_;
  HostCall call_;
};

struct Cpu {
  using Call = HostCall;
  using Send = CpuSend;
  using Recv = CpuRecv;
  using Forward = CpuRecv;  // it waits for messages, too
};

}  // namespace
}  // namespace jax_sm_free

// How XLA decodes what comes with a call.
namespace xla::ffi {

template <>
struct CtxBinding<jax_sm_free::SendSite*> {
  using Ctx = State<jax_sm_free::SendSite>;
};

template <>
struct CtxBinding<jax_sm_free::Running> {
  using Ctx = jax_sm_free::Running;
};

template <>
struct CtxDecoding<jax_sm_free::Running> {
  using Type = jax_sm_free::Running;
  static std::optional<Type> Decode(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* context,
                                    DiagnosticEngine& diagnostic) {
    const auto run = CtxDecoding<RunId>::Decode(api, context, diagnostic);
    const auto device = CtxDecoding<DeviceOrdinal>::Decode(api, context, diagnostic);
    if (!run || !device) return std::nullopt;
    return Type{run->run_id, *device};
  }
};

}  // namespace xla::ffi

namespace jax_sm_free {

std::vector<HandlerEntry> CpuHandlers() { return HandlersOf<Cpu>(MakeSendSiteHandler()); }

}  // namespace jax_sm_free
