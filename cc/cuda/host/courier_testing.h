// Regions of other ranks in the memory of a test, as a courier reaches them.

#ifndef JAX_SM_FREE_CC_CUDA_HOST_COURIER_TESTING_H_
#define JAX_SM_FREE_CC_CUDA_HOST_COURIER_TESTING_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <ostream>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cc/config.h"
#include "cc/cuda/device_state.h"
#include "cc/cuda/host/remote_regions.h"
#include "cc/fault.h"

namespace jax_sm_free::cuda {

using Bytes = std::vector<std::byte>;

// What a transport was asked for, in order.
struct Call {
  enum What { kPut, kPutAndWait, kSignal };
  What what;
  int32_t rank;
  int64_t offset;
  int64_t bytes = 0;
  uint64_t value = 0;

  bool operator==(const Call&) const = default;
};

inline void PrintTo(const Call& call, std::ostream* out) {
  *out << "{what " << call.what << ", rank " << call.rank << ", offset " << call.offset
       << ", bytes " << call.bytes << ", value " << call.value << "}";
}

// The regions of the other ranks in this process's memory. The bytes of a Put are read as late as
// they may be: when the signal behind them arrives.
struct Network {
  struct Pending {
    int64_t offset;
    const std::byte* source;
    int64_t bytes;
  };

  explicit Network(const Config& config)
      : regions(config.ep_size, Bytes(RegionsOf(config).total)), pending(config.ep_size) {}

  std::byte* At(int32_t rank, int64_t offset) { return regions[rank].data() + offset; }
  uint64_t WordAt(int32_t rank, int64_t offset) {
    uint64_t word = 0;
    std::memcpy(&word, At(rank, offset), sizeof(word));
    return word;
  }

  std::vector<Bytes> regions;                 // by rank
  std::vector<std::vector<Pending>> pending;  // by rank
  std::vector<Call> calls;
  std::vector<std::unique_ptr<Bytes>> outboxes;
  size_t most_outboxes = kMaxRanks;
};

class FakeRegions : public RemoteRegions {
 public:
  FakeRegions(Network* network, std::set<int32_t> served)
      : network_(*network), served_(std::move(served)) {}

  bool Serves(int32_t rank) const override { return served_.count(rank) != 0; }

  Result<std::byte*> MakeOutbox(size_t bytes) override {
    if (network_.outboxes.size() == network_.most_outboxes) {
      return Fault{.expected = std::to_string(bytes) + " bytes", .seen = "none", .exchange = {}};
    }
    return network_.outboxes.emplace_back(std::make_unique<Bytes>(bytes))->data();
  }

  void Put(int32_t rank, int64_t offset, const std::byte* source, int64_t bytes) override {
    network_.calls.push_back({Call::kPut, rank, offset, bytes});
    network_.pending[rank].push_back({offset, source, bytes});
  }

  void PutAndWait(int32_t rank, int64_t offset, const std::byte* source, int64_t bytes) override {
    network_.calls.push_back({Call::kPutAndWait, rank, offset, bytes});
    std::memcpy(network_.At(rank, offset), source, bytes);
  }

  void PutSignal(int32_t rank, int64_t offset, uint64_t value) override {
    network_.calls.push_back({Call::kSignal, rank, offset, 0, value});
    for (const auto& put : std::exchange(network_.pending[rank], {})) {
      std::memcpy(network_.At(rank, put.offset), put.source, put.bytes);
    }
    std::memcpy(network_.At(rank, offset), &value, sizeof(value));
  }

 private:
  Network& network_;
  const std::set<int32_t> served_;
};

inline constexpr Config kConfig = {
    .ep_size = 4, .num_experts = 8, .top_k = 2, .max_tokens = 16, .num_slots = 3, .row_bytes = 64};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_HOST_COURIER_TESTING_H_
