// Opens a buffer over the GPUs of several processes, one each, with NVSHMEM.

#ifndef JAX_SM_FREE_CC_CUDA_PROCESSES_NVSHMEM_BUFFER_H_
#define JAX_SM_FREE_CC_CUDA_PROCESSES_NVSHMEM_BUFFER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cc/config.h"
#include "cc/cuda/host/device_buffer.h"
#include "cc/cuda/processes/rendezvous.h"
#include "cc/fault.h"
#include "cc/runtime.h"

namespace jax_sm_free::cuda {

// Collective over all processes. `places` has one device, that of this process, and `library` is
// the path of NVSHMEM's library. When this returns a fault in one process, that process must tell
// the others, in the place of their next exchange.
//
// A rank whose memory is out of reach gets its messages through a Courier. With
// JAX_SM_FREE_NVSHMEM_PUTS in the environment every rank does, which tries the courier on one host.
Result<std::shared_ptr<DeviceBuffer>> OpenNvshmemBuffer(
    int64_t id, const Config& config, const std::vector<std::optional<Place>>& places,
    const std::string& library, const Processes& processes);

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_PROCESSES_NVSHMEM_BUFFER_H_
