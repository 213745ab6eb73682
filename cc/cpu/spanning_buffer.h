// A buffer over CPU devices of several processes.

#ifndef JAX_SM_FREE_CC_CPU_SPANNING_BUFFER_H_
#define JAX_SM_FREE_CC_CPU_SPANNING_BUFFER_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "cc/cpu/between_processes.h"
#include "cc/cpu/host_buffer.h"
#include "cc/cpu/wire.h"
#include "cc/fault.h"

namespace jax_sm_free {

// The part of the buffer in this process. All processes open their parts, exchange their addresses,
// and connect. Messages may arrive as soon as one of the processes has connected.
class SpanningBuffer : public HostBuffer {
 public:
  struct Processes {
    int32_t self = 0;
    int32_t count = 1;
    std::vector<std::vector<int32_t>> of_rank;  // [group][rank]
  };
  using OpenWire = std::function<Result<std::unique_ptr<Wire>>(Wire::Callbacks callbacks)>;

  // `places` are those of the devices of this process. `id` is the same in all processes.
  static Result<std::shared_ptr<SpanningBuffer>> Open(
      int64_t id, const Config& config, const std::vector<std::optional<Place>>& places,
      const Processes& processes, const OpenWire& open_wire);
  ~SpanningBuffer() override { Close(); }

  const std::string& address() const { return wire_->address(); }
  // Returns the processes that can not be reached. Wire::AwaitPeers has the details.
  std::vector<Wire::Unreached> Connect(std::vector<std::string> addresses,
                                       std::chrono::duration<double> patience) {
    wire_->Connect(std::move(addresses));
    return wire_->AwaitPeers(patience);
  }

  // The peers notice that this process has left.
  void Close() override;

  // The buffer ends with its first fault and keeps the fault.
  std::optional<std::string> TakeFault() override;

 private:
  SpanningBuffer(int64_t id, const Config& config, const std::vector<std::optional<Place>>& places)
      : HostBuffer(id, config, places, RunNames::kCounted) {}

  Wire::Callbacks Callbacks();
  void AddTransport(const Processes& processes);
  void OnEnd(const Fault& fault);
  std::shared_ptr<BetweenProcesses> TransportOf(const std::optional<WireNote>& note) const;
  std::shared_ptr<BetweenProcesses> FindTransport() const;
  BlockPool::Block Allocate(Wire::Header header, int64_t bytes) const;
  void OnMessage(int32_t process, Wire::Header header, BlockPool::Block payload, int64_t bytes);

  mutable std::mutex mutex_;
  std::optional<std::string> fault_;
  std::shared_ptr<BetweenProcesses> transport_;  // null until it is added
  std::unique_ptr<Wire> wire_;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_SPANNING_BUFFER_H_
