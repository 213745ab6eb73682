// The module jax_sm_free._cuda: handlers as capsules, and the buffers of GPUs.

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cc/cuda/device_buffer.h"
#include "cc/cuda/nvshmem_buffer.h"
#include "xla_ffi/cuda_handlers.h"
#include "xla_ffi/module.h"

namespace jax_sm_free {
namespace {

// Returns the buffer's id.
int64_t Register(Result<std::shared_ptr<cuda::DeviceBuffer>> made) {
  if (const Fault* fault = FaultOf(made)) throw std::runtime_error(fault->Describe());
  auto buffer = std::get<std::shared_ptr<cuda::DeviceBuffer>>(std::move(made));
  const int64_t id = buffer->id();
  Registry::Get().Add(std::move(buffer));
  return id;
}

int64_t OpenBuffer(const nb::dict& sizes, const PythonPlaces& places) {
  return Register(
      cuda::DeviceBuffer::Make(Registry::Get().NextId(), ToConfig(sizes), ToPlaces(places)));
}

// `exchange` takes and gives bytes: Processes::exchange.
int64_t OpenNvshmemBuffer(const nb::dict& sizes, const PythonPlaces& places,
                          const std::string& library, int32_t index,
                          const std::vector<int32_t>& of_rank, const nb::callable& exchange) {
  const Config config = ToConfig(sizes);
  const std::vector<std::optional<Place>> by_device = ToPlaces(places);
  const auto call = [&exchange](const std::string& text) {
    const nb::gil_scoped_acquire acquire;
    std::vector<std::string> heard;
    for (const nb::handle item : exchange(nb::bytes(text.data(), text.size()))) {
      const auto bytes = nb::cast<nb::bytes>(item);
      heard.emplace_back(bytes.c_str(), bytes.size());
    }
    return heard;
  };
  const cuda::Processes processes{index, of_rank, call};
  // Python goes on meanwhile: the other processes may wait for a callback of a program.
  const nb::gil_scoped_release release;
  return Register(cuda::OpenNvshmemBuffer(config, by_device, library, processes));
}

}  // namespace

NB_MODULE(_cuda, module) {
  module.doc() = "CUDA platform of jax_sm_free; use it through jax_sm_free.Buffer.";
  DefineCommon(module);
  module.def("handlers", [] { return Handlers(CudaHandlers()); });
  module.def("open_buffer", &OpenBuffer, nb::arg("sizes"), nb::arg("places").none());
  module.def("open_nvshmem_buffer", &OpenNvshmemBuffer, nb::arg("sizes"), nb::arg("places").none(),
             nb::arg("library"), nb::arg("index"), nb::arg("of_rank"), nb::arg("exchange"));
}

}  // namespace jax_sm_free
