// Opens a buffer over the GPUs of several processes, one each.

#ifndef JAX_SM_FREE_CC_CUDA_PROCESSES_NVSHMEM_BUFFER_H_
#define JAX_SM_FREE_CC_CUDA_PROCESSES_NVSHMEM_BUFFER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cc/config.h"
#include "cc/cuda/host/device_buffer.h"
#include "cc/fault.h"
#include "cc/runtime.h"

namespace jax_sm_free::cuda {

// The processes that open a buffer together, numbered in an order of their own.
struct Processes {
  int32_t index = 0;             // this one
  std::vector<int32_t> of_rank;  // by rank of this process's group
  // Gives a text to all, and returns those of all, in their order. Collective. Throws if a process
  // fails or does not come.
  std::function<std::vector<std::string>(const std::string&)> exchange;
  std::function<void(const std::string&)> warn;
};

// Collective over all the processes: `places` has one device, that of this process, and `library`
// is the path of NVSHMEM's. When one gets a fault, the others must be told in the place of their
// next exchange. Ranks whose memory is out of reach get their messages through a Courier; with
// JAX_SM_FREE_NVSHMEM_PUTS in the environment all do, so that it can be tried on one host.
Result<std::shared_ptr<DeviceBuffer>> OpenNvshmemBuffer(
    int64_t id, const Config& config, const std::vector<std::optional<Place>>& places,
    const std::string& library, const Processes& processes);

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_PROCESSES_NVSHMEM_BUFFER_H_
