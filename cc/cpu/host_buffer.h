// A buffer over CPU devices: for each rank a ledger and a block pool, for each group a transport.

#ifndef JAX_SM_FREE_CC_CPU_HOST_BUFFER_H_
#define JAX_SM_FREE_CC_CPU_HOST_BUFFER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "cc/cpu/block_pool.h"
#include "cc/cpu/in_process.h"
#include "cc/exchange.h"
#include "cc/runtime.h"

namespace jax_sm_free {

// One rank of a host buffer.
struct HostRank {
  HostRank(int64_t buffer_id, const Place& place, const Config& config)
      : rank(place.rank),
        position(place.position),
        ledger(buffer_id, place.rank, config.num_slots),
        pool(MaxMessageBytes(config)) {}

  const int32_t rank;
  const int32_t position;  // in the mesh
  Ledger ledger;
  BlockPool pool;
  std::shared_ptr<InProcess> transport;  // of its group
};

class HostBuffer : public Buffer {
 public:
  HostBuffer(int64_t id, const Config& config, const std::vector<std::optional<Place>>& places);
  ~HostBuffer() override { CloseTransports(); }

  // Null for a device outside the buffer's mesh.
  HostRank* RankOf(int32_t device) const;

  void Close() override { CloseTransports(); }
  int64_t MessageBytes(int32_t device) const override;

 private:
  void CloseTransports();
  void OnFail(size_t group, int64_t run, const Fault& fault);

  std::vector<std::vector<std::unique_ptr<HostRank>>> groups_;  // [group][rank]
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_HOST_BUFFER_H_
