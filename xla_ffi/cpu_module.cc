// The module jax_sm_free._cpu: handlers as capsules, and the buffers of CPU devices.

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cc/cpu/host_buffer.h"
#include "cc/cpu/spanning_buffer.h"
#include "cc/cpu/ucx_wire.h"
#include "xla_ffi/cpu_handlers.h"
#include "xla_ffi/cuda_stub.h"
#include "xla_ffi/module.h"
#include "xla_ffi/send_site.h"

namespace jax_sm_free {
namespace {

nb::dict CallSiteType() {
  nb::dict type;
  type["type_id"] = nb::capsule(CallSiteTypeId());
  type["type_info"] = nb::capsule(CallSiteTypeInfo());
  return type;
}

// Returns the buffer's id.
int64_t OpenBuffer(const std::string& name, const nb::dict& sizes, const PythonPlaces& places) {
  Registry& registry = Registry::Get();
  const int64_t id = registry.NextId();
  registry.Add(std::make_shared<HostBuffer>(id, ToConfig(sizes), ToPlaces(places)), name);
  return id;
}

// This process's part of a buffer over several: process `self` of `count`, those of the ranks in
// `of_rank` [group][rank]. `library`: path of libucp.so.0.
void OpenUcxBuffer(int64_t id, const std::string& name, const nb::dict& sizes,
                   const PythonPlaces& places, int32_t self, int32_t count, std::vector<std::vector<int32_t>> of_rank,
                   const std::string& library) {
  const Config config = ToConfig(sizes);
  const UcxWire::Options options{
      .library = library, .self = self, .num_peers = count, .link_timeout_s = config.timeout_s};
  const auto open_wire = [&options](Wire::Callbacks callbacks) -> Result<std::unique_ptr<Wire>> {
    auto wire = UcxWire::Open(options, std::move(callbacks));
    if (const Fault* fault = FaultOf(wire)) return *fault;
    return std::unique_ptr<Wire>(std::move(std::get<0>(wire)));
  };
  auto buffer = SpanningBuffer::Open(id, config, ToPlaces(places),
                                     {self, count, std::move(of_rank)}, open_wire);
  if (const Fault* fault = FaultOf(buffer)) throw std::runtime_error(fault->Describe());
  Registry::Get().Add(std::get<0>(std::move(buffer)), name);
}

std::shared_ptr<SpanningBuffer> FindSpanning(int64_t id) {
  auto buffer = std::dynamic_pointer_cast<SpanningBuffer>(FindOpen(id));
  if (buffer == nullptr) {
    throw std::runtime_error("jax_sm_free: buffer " + std::to_string(id) + " has no address");
  }
  return buffer;
}

nb::bytes AddressOf(int64_t id) {
  const std::string& address = FindSpanning(id)->address();
  return nb::bytes(address.data(), address.size());
}

void Connect(int64_t id, const std::vector<nb::bytes>& addresses) {
  std::vector<std::string> copied;
  copied.reserve(addresses.size());
  for (const nb::bytes& address : addresses) copied.emplace_back(address.c_str(), address.size());
  FindSpanning(id)->Connect(std::move(copied));
}

}  // namespace

NB_MODULE(_cpu, module) {
  module.doc() = "CPU platform of jax_sm_free; use it through jax_sm_free.Buffer.";
  DefineCommon(module);
  module.def("handlers", [] { return Handlers(CpuHandlers()); });
  module.def("cuda_handlers", [] { return Handlers(CudaStubHandlers()); });
  module.def("call_site_type", &CallSiteType);
  module.def("open_buffer", &OpenBuffer, nb::arg("name"), nb::arg("sizes"), nb::arg("places").none());
  module.def("open_ucx_buffer", &OpenUcxBuffer);
  module.def("address", &AddressOf);
  module.def("connect", &Connect);
}

}  // namespace jax_sm_free
