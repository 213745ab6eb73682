// One call of an op by one rank: whose it is, what several ops take, and what ends it.

#ifndef JAX_SM_FREE_XLA_FFI_CUDA_CALL_H_
#define JAX_SM_FREE_XLA_FFI_CUDA_CALL_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>

#include "cc/cuda/host/device_buffer.h"
#include "cc/cuda/kernels/kernels.h"
#include "cc/op.h"
#include "xla/ffi/api/ffi.h"
#include "xla_ffi/decode.h"

namespace jax_sm_free::cuda {

namespace ffi = xla::ffi;

struct Call {
  const char* name = "";
  std::shared_ptr<DeviceBuffer> buffer;
  DeviceRank* rank = nullptr;

  const Config& config() const { return buffer->config(); }
  const RankView& view() const { return rank->view; }
};

// Finds the buffer of a program's name for it, and the rank; an earlier fault of the buffer is this
// call's error.
ffi::Error Locate(Op op, std::string_view name, int32_t device, Call& call);

inline ExpertRows ExpertRowsOf(const ffi::AnyBuffer& y, const F32& weights, const S32& rows,
                               const S32& num_rows_from) {
  return {static_cast<const std::byte*>(y.untyped_data()), DataOrNull(weights),
          LayoutOf(rows, num_rows_from, y.dimensions()[0])};
}

// Whether all kernels of the call could be enqueued.
ffi::Error Enqueued(const Call& call);

// Every op: the program's name for the buffer, the device, and the stream to enqueue on.
inline auto BindCall() {
  return ffi::Ffi::Bind()
      .Attr<std::string_view>("buffer")
      .Ctx<ffi::DeviceOrdinal>()
      .Ctx<ffi::PlatformStream<cudaStream_t>>();
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_XLA_FFI_CUDA_CALL_H_
