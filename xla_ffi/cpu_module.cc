// The module jax_sm_free._cpu: handlers as capsules, and the buffers of CPU devices.

#include <chrono>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cc/cpu/host_buffer.h"
#include "cc/cpu/shared_wire.h"
#include "cc/cpu/spanning_buffer.h"
#include "cc/cpu/ucx_wire.h"
#include "nanobind/stl/pair.h"
#include "xla_ffi/cuda_stub.h"
#include "xla_ffi/handler_entry.h"
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

using HeldWire = std::shared_ptr<SharedWire>;

// A Python object that holds a wire while Python opens a buffer over it.
nb::object Hold(HeldWire wire) {
  if (wire == nullptr) return nb::none();
  return nb::capsule(new HeldWire(std::move(wire)), [](void* held) noexcept {
    const nb::gil_scoped_release release;  // the last holder waits for peers
    delete static_cast<HeldWire*>(held);
  });
}

SharedWire& Held(const nb::capsule& wire) { return **static_cast<HeldWire*>(wire.data()); }

nb::object FindWire(const std::string& key) {
  HeldWire wire;
  {
    const nb::gil_scoped_release release;
    wire = SharedWires::Get().Find(key);
  }
  return Hold(std::move(wire));
}

// Opens this process's end of a wire over UCX: process `self` of `count` processes. `library` is
// the path of libucp.so.0. `settings` are variables of UCX, without the prefix UCX_.
nb::object OpenWire(int64_t id, const std::string& key, int32_t self, int32_t count,
                    const std::string& library, double link_timeout_s,
                    std::vector<std::pair<std::string, std::string>> settings) {
  const UcxWire::Options options{.library = library,
                                 .self = self,
                                 .num_peers = count,
                                 .link_timeout_s = link_timeout_s,
                                 .settings = std::move(settings)};
  const auto open_wire = [&options](Wire::Callbacks callbacks) -> Result<std::unique_ptr<Wire>> {
    auto wire = UcxWire::Open(options, std::move(callbacks));
    if (const Fault* fault = FaultOf(wire)) return *fault;
    return std::unique_ptr<Wire>(std::move(std::get<0>(wire)));
  };
  auto shared = SharedWire::Open(id, self, count, open_wire);
  if (const Fault* fault = FaultOf(shared)) throw std::runtime_error(fault->Describe());
  SharedWires::Get().Add(key, std::get<0>(shared));
  return Hold(std::get<0>(std::move(shared)));
}

// Opens this process's part of a buffer over several processes: process `self` of `count`.
// `of_rank` [group][rank] is the process of each rank.
void OpenUcxBuffer(int64_t id, const std::string& name, const nb::dict& sizes,
                   const PythonPlaces& places, int32_t self, int32_t count,
                   std::vector<std::vector<int32_t>> of_rank, const nb::capsule& wire) {
  const auto attach = [id, &wire](Wire::Callbacks callbacks) -> Result<std::unique_ptr<Wire>> {
    return Held(wire).Attach(id, std::move(callbacks));
  };
  auto buffer = SpanningBuffer::Open(id, ToConfig(sizes), ToPlaces(places),
                                     {self, count, std::move(of_rank)}, attach);
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

// Returns the processes that can not be reached, and why.
std::vector<std::pair<int32_t, std::string>> Connect(int64_t id,
                                                     const std::vector<nb::bytes>& addresses,
                                                     double patience_s) {
  std::vector<std::string> copied;
  copied.reserve(addresses.size());
  for (const nb::bytes& address : addresses) copied.emplace_back(address.c_str(), address.size());
  const auto buffer = FindSpanning(id);
  const nb::gil_scoped_release release;
  std::vector<std::pair<int32_t, std::string>> unreached;
  for (const auto& [peer, reason] :
       buffer->Connect(std::move(copied), std::chrono::duration<double>(patience_s))) {
    unreached.emplace_back(peer, reason);
  }
  return unreached;
}

}  // namespace

NB_MODULE(_cpu, module) {
  module.doc() = "CPU platform of jax_sm_free; use it through jax_sm_free.Buffer.";
  DefineCommon(module);
  module.def("handlers", [] { return Handlers(CpuHandlers()); });
  module.def("cuda_handlers", [] { return Handlers(CudaStubHandlers()); });
  module.def("call_site_type", &CallSiteType);
  module.def("open_buffer", &OpenBuffer, nb::arg("name"), nb::arg("sizes"),
             nb::arg("places").none());
  module.def("find_wire", &FindWire);
  module.def("open_wire", &OpenWire);
  module.def("wire_id", [](const nb::capsule& wire) { return Held(wire).id(); });
  module.def("open_ucx_buffer", &OpenUcxBuffer);
  module.def("address", &AddressOf);
  module.def("connect", &Connect);
}

}  // namespace jax_sm_free
