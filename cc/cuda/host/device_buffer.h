// A buffer over GPUs: all GPUs of one process, or one GPU of each of several processes.

#ifndef JAX_SM_FREE_CC_CUDA_HOST_DEVICE_BUFFER_H_
#define JAX_SM_FREE_CC_CUDA_HOST_DEVICE_BUFFER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cc/cuda/device_state.h"
#include "cc/cuda/host/counter_reader.h"
#include "cc/cuda/host/courier.h"
#include "cc/cuda/host/crossbar.h"
#include "cc/cuda/host/group_end.h"
#include "cc/cuda/host/mover.h"
#include "cc/cuda/rank_view.h"
#include "cc/fault.h"
#include "cc/runtime.h"

namespace jax_sm_free::cuda {

// Memory of one kind on one device, freed with its owner.
struct Freer {
  int device;
  bool host;
  void operator()(void* memory) const;
};
using Memory = std::unique_ptr<void, Freer>;

struct DeviceRank {
  RankView view;
  uint64_t* copies_done = nullptr;  // [ep_size], for the mover
  std::unique_ptr<Mover> mover;
  std::unique_ptr<CounterReader> counters;

  // The first fault of this rank, if it has met one. It stays.
  std::optional<Fault> SeenFault() const;
};

// What a process knows of its group if the other ranks are in other processes.
struct Neighbours {
  // By rank: the region, the own one included, or the courier's outbox for a rank out of reach.
  std::vector<std::byte*> regions;
  std::shared_ptr<void> memory;  // keeps the regions alive
  std::shared_ptr<Crossbar> crossbar;
  std::shared_ptr<Courier> courier;     // null if all regions are within reach
  std::shared_ptr<GroupEnd> group_end;  // for the processes of this host
};

class DeviceBuffer : public Buffer {
 public:
  // Takes all memory and loads all kernels. With `neighbours`, `places` has one device, and the
  // regions are those of `neighbours`. Nobody may send to this rank before this returns.
  static Result<std::shared_ptr<DeviceBuffer>> Make(
      int64_t id, const Config& config, const std::vector<std::optional<Place>>& places,
      const std::optional<Neighbours>& neighbours = std::nullopt);
  ~DeviceBuffer() override { Free(); }

  // Null for a device outside the buffer's mesh.
  DeviceRank* RankOf(int32_t device) const;

  // The first fault of any rank that this process knows of. The fault stays, and every later call
  // and check meets it, because nobody knows what else is under way.
  std::optional<std::string> SeenFault() const;
  std::optional<std::string> TakeFault() override { return SeenFault(); }

  // Ends all waits soon, with a fault. Called when this process refuses a call, because a peer may
  // wait for that call.
  void Stop();

  // Ends all waits. The memory is freed after the last call that still enqueues.
  void Close() override;
  int64_t MessageBytes(int32_t device) const override;
  Result<RankStats> Stats(int32_t device) override { return RankOf(device)->counters->Read(); }

 private:
  using Buffer::Buffer;
  // Makes the rank of `device`. Takes memory for its own region if `region` is null. Returns what
  // went wrong, or an empty text. So do Connect and, in `error`, Take.
  std::string Allocate(int32_t device, const Place& place, std::byte* region);
  // Finds the regions of the other ranks of the group.
  std::string Connect(int32_t device, const std::vector<std::optional<Place>>& places);
  void StartMovers(const std::vector<std::optional<Place>>& places);
  void* Take(int32_t device, bool host, int64_t bytes, std::string& error);
  void Free();

  std::vector<std::unique_ptr<DeviceRank>> ranks_;  // by device
  std::vector<Memory> memory_;
  std::optional<Neighbours> neighbours_;
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_HOST_DEVICE_BUFFER_H_
