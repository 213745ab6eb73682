// What the extension modules of all platforms offer to Python.

#ifndef JAX_SM_FREE_XLA_FFI_MODULE_H_
#define JAX_SM_FREE_XLA_FFI_MODULE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cc/config.h"
#include "cc/layout.h"
#include "cc/rank_stats.h"
#include "cc/runtime.h"
#include "cc/tiers.h"
#include "cc/wire_format.h"
#include "nanobind/nanobind.h"
#include "nanobind/stl/optional.h"
#include "nanobind/stl/string.h"  // IWYU pragma: keep
#include "nanobind/stl/tuple.h"
#include "nanobind/stl/vector.h"
#include "xla_ffi/handler_entry.h"

namespace jax_sm_free {

namespace nb = nanobind;

// For each device ordinal its (group, rank, position in the mesh), or None.
using PythonPlaces = std::vector<std::optional<std::tuple<int32_t, int32_t, int32_t>>>;

inline std::vector<std::optional<Place>> ToPlaces(const PythonPlaces& places) {
  std::vector<std::optional<Place>> by_device;
  for (const auto& place : places) {
    std::optional<Place>& added = by_device.emplace_back();
    if (place) added = Place{std::get<0>(*place), std::get<1>(*place), std::get<2>(*place)};
  }
  return by_device;
}

inline nb::capsule Capsule(XLA_FFI_Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

// {target: {stage: capsule}}, as jax.ffi.register_ffi_target takes it.
inline nb::dict Handlers(const std::vector<HandlerEntry>& entries) {
  nb::dict handlers;
  for (const HandlerEntry& entry : entries) {
    nb::dict stages;
    if (entry.instantiate != nullptr) stages["instantiate"] = Capsule(entry.instantiate);
    stages["execute"] = Capsule(entry.execute);
    handlers[entry.target] = stages;
  }
  return handlers;
}

inline std::shared_ptr<Buffer> FindOpen(int64_t id) {
  auto buffer = Registry::Get().Find(id);
  if (buffer == nullptr) {
    throw std::runtime_error("jax_sm_free: buffer " + std::to_string(id) + " is closed");
  }
  return buffer;
}

// Takes the sizes from a dictionary. Not from a class: two modules can not both define the same
// class.
inline Config ToConfig(const nb::dict& sizes) {
  Config config;
  const auto take = [&sizes](const char* name, auto& value) {
    value = nb::cast<std::remove_reference_t<decltype(value)>>(sizes[name]);
  };
  take("ep_size", config.ep_size);
  take("num_experts", config.num_experts);
  take("top_k", config.top_k);
  take("max_tokens", config.max_tokens);
  take("recv_capacity", config.recv_capacity);
  take("num_slots", config.num_slots);
  take("expert_alignment", config.expert_alignment);
  take("expert_capacity", config.expert_capacity);
  take("row_bytes", config.row_bytes);
  take("timeout_s", config.timeout_s);
  int32_t wire_format = 0;
  take("wire_format", wire_format);
  config.wire_format = static_cast<WireFormat>(wire_format);
  take("num_nodes", config.num_nodes);
  take("node_stride", config.node_stride);
  int32_t dtype = 0;
  take("dtype", dtype);
  config.dtype = static_cast<DType>(dtype);
  return config;
}

// What the rank of a device has counted, by name.
inline nb::dict StatsOf(int64_t id, int32_t device) {
  const std::shared_ptr<Buffer> buffer = FindOpen(id);
  const std::optional<Place> place = buffer->PlaceOf(device);
  if (!place) throw std::out_of_range("device " + std::to_string(device));
  const Result<RankStats> read = [&] {
    const nb::gil_scoped_release release;
    return buffer->Stats(device);
  }();
  if (const Fault* fault = FaultOf(read)) throw std::runtime_error(fault->Describe());
  const auto& stats = std::get<RankStats>(read);
  nb::dict exchanges;
  for (int kind = 0; kind < kNumKinds; ++kind) {
    exchanges[KindName(static_cast<Kind>(kind))] = stats.exchanges[kind];
  }
  nb::dict by_name;
  by_name["group"] = place->group;
  by_name["rank"] = place->rank;
  by_name["exchanges"] = exchanges;
  by_name["bytes_sent"] = stats.bytes_sent;
  by_name["bytes_received"] = stats.bytes_received;
  by_name["rows_dropped"] = stats.rows_dropped;
  by_name["waited_ns"] = stats.waited_ns;
  return by_name;
}

// Defines the functions on buffers. Each module adds its own `handlers` and `open_buffer`.
inline void DefineCommon(nb::module_& module) {
  module.def("max_message_bytes",
             [](const nb::dict& sizes) { return MaxMessageBytes(ToConfig(sizes)); });
  module.def("max_rail_message_bytes",
             [](const nb::dict& sizes) { return MaxMessageBytes(RailConfig(ToConfig(sizes))); });
  module.def(
      "close_buffer", [](int64_t id) { return Registry::Get().Close(id); },
      nb::call_guard<nb::gil_scoped_release>());
  module.def(
      "drop_buffer", [](int64_t id) { Registry::Get().Drop(id); },
      nb::call_guard<nb::gil_scoped_release>());
  module.def(
      "close_all", [] { Registry::Get().CloseAll(); }, nb::call_guard<nb::gil_scoped_release>());
  module.def("lowest_free_id", [] { return Registry::Get().LowestFreeId(); });
  module.def("take_fault", [](int64_t id) { return FindOpen(id)->TakeFault(); });
  module.def("stats", &StatsOf);
  module.def("message_bytes",
             [](int64_t id, int32_t device) { return FindOpen(id)->MessageBytes(device); });
}

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_XLA_FFI_MODULE_H_
