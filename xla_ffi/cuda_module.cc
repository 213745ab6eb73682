// The module jax_sm_free._cuda: handlers as capsules, and the buffers of GPUs.

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cc/cuda/host/device_buffer.h"
#include "cc/cuda/processes/nvshmem_buffer.h"
#include "cc/cuda/processes/rendezvous.h"
#include "xla_ffi/handler_entry.h"
#include "xla_ffi/module.h"

namespace jax_sm_free {
namespace {

void Register(Result<std::shared_ptr<cuda::DeviceBuffer>> made, const std::string& name) {
  if (const Fault* fault = FaultOf(made)) throw std::runtime_error(fault->Describe());
  Registry::Get().Add(std::get<std::shared_ptr<cuda::DeviceBuffer>>(std::move(made)), name);
}

// Returns the buffer's id.
int64_t OpenBuffer(const std::string& name, const nb::dict& sizes, const PythonPlaces& places) {
  const int64_t id = Registry::Get().NextId();
  Register(cuda::DeviceBuffer::Make(id, ToConfig(sizes), ToPlaces(places)), name);
  return id;
}

// `exchange` takes and gives bytes, `warn` takes a text: the functions of Processes. Both outlive
// what this returns, which may be used without the GIL.
cuda::Processes ToProcesses(int32_t process, const std::vector<int32_t>& process_of_rank,
                            const nb::callable& exchange, const nb::callable& warn) {
  const auto call = [&exchange](const std::string& text) {
    const nb::gil_scoped_acquire acquire;
    std::vector<std::string> heard;
    for (const nb::handle item : exchange(nb::bytes(text.data(), text.size()))) {
      const auto bytes = nb::cast<nb::bytes>(item);
      heard.emplace_back(bytes.c_str(), bytes.size());
    }
    return heard;
  };
  const auto call_warn = [&warn](const std::string& text) {
    const nb::gil_scoped_acquire acquire;
    warn(text);
  };
  return {process, process_of_rank, call, call_warn};
}

void OpenNvshmemBuffer(int64_t id, const std::string& name, const nb::dict& sizes,
                       const PythonPlaces& places, int32_t process,
                       const std::vector<int32_t>& process_of_rank, const std::string& library,
                       const nb::callable& exchange, const nb::callable& warn) {
  const Config config = ToConfig(sizes);
  const std::vector<std::optional<Place>> by_device = ToPlaces(places);
  const cuda::Processes processes = ToProcesses(process, process_of_rank, exchange, warn);
  // Other threads of Python run meanwhile, because the other processes may wait for a callback of a
  // program.
  const nb::gil_scoped_release release;
  Register(cuda::OpenNvshmemBuffer(id, config, by_device, library, processes), name);
}

}  // namespace

NB_MODULE(_cuda, module) {
  module.doc() = "CUDA platform of jax_sm_free; use it through jax_sm_free.Buffer.";
  DefineCommon(module);
  module.def("handlers", [] { return Handlers(CudaHandlers()); });
  module.def("open_buffer", &OpenBuffer, nb::arg("name"), nb::arg("sizes"),
             nb::arg("places").none());
  module.def("open_nvshmem_buffer", &OpenNvshmemBuffer, nb::arg("id"), nb::arg("name"),
             nb::arg("sizes"), nb::arg("places").none(), nb::arg("process"),
             nb::arg("process_of_rank"), nb::arg("library"), nb::arg("exchange"), nb::arg("warn"));
}

}  // namespace jax_sm_free
