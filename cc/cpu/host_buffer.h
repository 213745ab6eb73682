// A buffer over CPU devices. Each rank has a ledger and a pool of blocks; all ranks share a
// transport.

#ifndef JAX_SM_FREE_CC_CPU_HOST_BUFFER_H_
#define JAX_SM_FREE_CC_CPU_HOST_BUFFER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cc/cpu/block_pool.h"
#include "cc/cpu/exchange.h"
#include "cc/cpu/rank_counters.h"
#include "cc/cpu/transport.h"
#include "cc/runtime.h"
#include "cc/tiers.h"

namespace jax_sm_free {

// One rank of a host buffer.
struct HostRank {
  HostRank(int64_t buffer_id, const Place& place, const Config& config, RunNames names)
      : rank(place.rank),
        member(place.group * config.ep_size + place.rank),
        position(place.position),
        ledger(buffer_id, place.rank, config, names),
        pool(MaxMessageBytesOfTiers(config)),
        counters(config.ep_size) {}

  const int32_t rank;
  const int32_t member;    // the number that Transport describes
  const int32_t position;  // in the mesh
  Ledger ledger;
  BlockPool pool;
  RankCounters counters;
  std::shared_ptr<Transport> transport;  // of all ranks
};

class HostBuffer : public Buffer {
 public:
  // A buffer whose ranks are all in this process.
  HostBuffer(int64_t id, const Config& config, const std::vector<std::optional<Place>>& places);
  ~HostBuffer() override { CloseTransport(); }

  // Null for a device outside the buffer's mesh.
  HostRank* RankOf(int32_t device) const;

  void Close() override { CloseTransport(); }
  int64_t MessageBytes(int32_t device) const override;
  Result<RankStats> Stats(int32_t device) override;

 protected:
  // By member; null for ranks of other processes.
  using Ranks = std::vector<std::unique_ptr<HostRank>>;

  // Makes a buffer without a transport. The caller adds one.
  HostBuffer(int64_t id, const Config& config, const std::vector<std::optional<Place>>& places,
             RunNames names);

  const Ranks& ranks() const { return ranks_; }
  void SetTransport(const std::shared_ptr<Transport>& transport);
  void CloseTransport();

 private:
  // The transport calls this while it is locked.
  void OnFail(int64_t run, const Fault& fault);

  Ranks ranks_;
  std::shared_ptr<Transport> transport_;
  std::string told_;  // the latest text on stderr
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_HOST_BUFFER_H_
