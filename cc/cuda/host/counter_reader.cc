#include "cc/cuda/host/counter_reader.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "cc/cuda/host/device_scope.h"

namespace jax_sm_free::cuda {
namespace {

std::vector<int64_t> ByRank(const Counters::Counter* counters, int32_t ep_size) {
  return {counters, counters + ep_size};
}

RankStats StatsOf(const Counters& counters, int32_t ep_size) {
  RankStats stats{.rows_dropped = static_cast<int64_t>(counters.rows_dropped),
                  .bytes_sent = ByRank(counters.bytes_sent, ep_size),
                  .bytes_received = ByRank(counters.bytes_received, ep_size),
                  .waited_ns = ByRank(counters.waited_ns, ep_size)};
  std::ranges::copy(counters.exchanges, stats.exchanges.begin());
  return stats;
}

}  // namespace

CounterReader::CounterReader(int device, const RankView& view, Counters* copy)
    : device_(device), view_(view), copy_(copy) {
  const DeviceScope scope;
  (void)cudaSetDevice(device_);
  status_ = cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking);
}

CounterReader::~CounterReader() {
  const DeviceScope scope;
  (void)cudaSetDevice(device_);
  if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
}

Result<RankStats> CounterReader::Read() {
  const std::lock_guard lock(mutex_);
  const DeviceScope scope;
  cudaError_t status = status_;
  if (status == cudaSuccess) status = cudaSetDevice(device_);
  if (status == cudaSuccess) {
    status = cudaMemcpyAsync(copy_, &view_.state->counters, sizeof(Counters),
                             cudaMemcpyDeviceToHost, stream_);
  }
  if (status == cudaSuccess) status = cudaStreamSynchronize(stream_);
  if (status == cudaSuccess) return StatsOf(*copy_, view_.config.ep_size);
  (void)cudaGetLastError();
  return Fault{.op = "stats",
               .rank = view_.rank,
               .expected = "the counters of device " + std::to_string(device_),
               .seen = cudaGetErrorString(status),
               .exchange = {}};
}

}  // namespace jax_sm_free::cuda
