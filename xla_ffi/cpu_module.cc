// The module jax_sm_free._cpu: handlers as capsules, and the buffers of CPU devices.

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cc/config.h"
#include "cc/cpu/host_buffer.h"
#include "cc/layout.h"
#include "cc/runtime.h"
#include "nanobind/nanobind.h"
#include "nanobind/stl/optional.h"
#include "nanobind/stl/string.h"  // IWYU pragma: keep
#include "nanobind/stl/tuple.h"
#include "nanobind/stl/vector.h"
#include "xla_ffi/cpu_handlers.h"
#include "xla_ffi/cuda_stub.h"

namespace jax_sm_free {
namespace {

namespace nb = nanobind;

nb::capsule Capsule(XLA_FFI_Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

// {target: {stage: capsule}}, as jax.ffi.register_ffi_target takes them.
nb::dict Handlers(const std::vector<HandlerEntry>& entries) {
  nb::dict handlers;
  for (const HandlerEntry& entry : entries) {
    nb::dict stages;
    if (entry.instantiate != nullptr) stages["instantiate"] = Capsule(entry.instantiate);
    stages["execute"] = Capsule(entry.execute);
    handlers[entry.target] = stages;
  }
  return handlers;
}

nb::dict CallSiteType() {
  nb::dict type;
  type["type_id"] = nb::capsule(CallSiteTypeId());
  type["type_info"] = nb::capsule(CallSiteTypeInfo());
  return type;
}

// places: for each device ordinal its (group, rank, position in the mesh), or None. Returns the
// buffer's id.
int64_t OpenBuffer(
    const Config& config,
    const std::vector<std::optional<std::tuple<int32_t, int32_t, int32_t>>>& places) {
  std::vector<std::optional<Place>> by_device;
  for (const auto& place : places) {
    by_device.push_back(place ? std::optional(std::make_from_tuple<Place>(*place)) : std::nullopt);
  }
  Registry& registry = Registry::Get();
  const int64_t id = registry.NextId();
  registry.Add(std::make_shared<HostBuffer>(id, config, std::move(by_device)));
  return id;
}

std::shared_ptr<Buffer> FindOpen(int64_t id) {
  auto buffer = Registry::Get().Find(id);
  if (buffer == nullptr) {
    throw std::runtime_error("jax_sm_free: buffer " + std::to_string(id) + " is closed");
  }
  return buffer;
}

}  // namespace

NB_MODULE(_cpu, module) {
  module.doc() = "CPU platform of jax_sm_free; use it through jax_sm_free.Buffer.";
  nb::class_<Config>(module, "Config")
      .def(nb::init<>())
      .def_rw("ep_size", &Config::ep_size)
      .def_rw("num_experts", &Config::num_experts)
      .def_rw("top_k", &Config::top_k)
      .def_rw("max_tokens", &Config::max_tokens)
      .def_rw("recv_capacity", &Config::recv_capacity)
      .def_rw("num_slots", &Config::num_slots)
      .def_rw("expert_alignment", &Config::expert_alignment)
      .def_rw("row_bytes", &Config::row_bytes)
      .def_rw("timeout_s", &Config::timeout_s)
      .def("max_message_bytes", &MaxMessageBytes);
  module.def("handlers", [] { return Handlers(CpuHandlers()); });
  module.def("cuda_handlers", [] { return Handlers(CudaStubHandlers()); });
  module.def("call_site_type", &CallSiteType);
  module.def("open_buffer", &OpenBuffer, nb::arg("config"), nb::arg("places").none());
  module.def(
      "close_buffer", [](int64_t id) { return Registry::Get().Close(id); },
      nb::call_guard<nb::gil_scoped_release>());
  module.def("is_open", [](int64_t id) { return Registry::Get().Find(id) != nullptr; });
  module.def("take_fault", [](int64_t id) { return FindOpen(id)->TakeFault(); });
  module.def("message_bytes",
             [](int64_t id, int32_t device) { return FindOpen(id)->MessageBytes(device); });
}

}  // namespace jax_sm_free
