// The module jax_sm_free._cuda: handlers as capsules, and the buffers of GPUs.

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <utility>

#include "cc/cuda/device_buffer.h"
#include "xla_ffi/cuda_handlers.h"
#include "xla_ffi/module.h"

namespace jax_sm_free {
namespace {

// Returns the buffer's id.
int64_t OpenBuffer(const nb::dict& sizes, const PythonPlaces& places) {
  Registry& registry = Registry::Get();
  const int64_t id = registry.NextId();
  auto made = cuda::DeviceBuffer::Make(id, ToConfig(sizes), ToPlaces(places));
  if (const Fault* fault = FaultOf(made)) throw std::runtime_error(fault->Describe());
  registry.Add(std::get<std::shared_ptr<cuda::DeviceBuffer>>(std::move(made)));
  return id;
}

}  // namespace

NB_MODULE(_cuda, module) {
  module.doc() = "CUDA platform of jax_sm_free; use it through jax_sm_free.Buffer.";
  DefineCommon(module);
  module.def("handlers", [] { return Handlers(CudaHandlers()); });
  module.def("open_buffer", &OpenBuffer, nb::arg("sizes"), nb::arg("places").none());
}

}  // namespace jax_sm_free
