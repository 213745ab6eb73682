// The module jax_sm_free._cpu: handlers as capsules, and the buffers of CPU devices.

#include <cstdint>
#include <memory>

#include "cc/cpu/host_buffer.h"
#include "xla_ffi/cpu_handlers.h"
#include "xla_ffi/cuda_stub.h"
#include "xla_ffi/module.h"

namespace jax_sm_free {
namespace {

nb::dict CallSiteType() {
  nb::dict type;
  type["type_id"] = nb::capsule(CallSiteTypeId());
  type["type_info"] = nb::capsule(CallSiteTypeInfo());
  return type;
}

// Returns the buffer's id.
int64_t OpenBuffer(const nb::dict& sizes, const PythonPlaces& places) {
  Registry& registry = Registry::Get();
  const int64_t id = registry.NextId();
  registry.Add(std::make_shared<HostBuffer>(id, ToConfig(sizes), ToPlaces(places)));
  return id;
}

}  // namespace

NB_MODULE(_cpu, module) {
  module.doc() = "CPU platform of jax_sm_free; use it through jax_sm_free.Buffer.";
  DefineCommon(module);
  module.def("handlers", [] { return Handlers(CpuHandlers()); });
  module.def("cuda_handlers", [] { return Handlers(CudaStubHandlers()); });
  module.def("call_site_type", &CallSiteType);
  module.def("open_buffer", &OpenBuffer, nb::arg("sizes"), nb::arg("places").none());
}

}  // namespace jax_sm_free
