// A buffer over CPU devices: for each rank a ledger and a block pool, for each group a transport.

#ifndef JAX_SM_FREE_CC_CPU_HOST_BUFFER_H_
#define JAX_SM_FREE_CC_CPU_HOST_BUFFER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "cc/cpu/block_pool.h"
#include "cc/cpu/transport.h"
#include "cc/exchange.h"
#include "cc/runtime.h"

namespace jax_sm_free {

// One rank of a host buffer.
struct HostRank {
  HostRank(int64_t buffer_id, const Place& place, const Config& config, RunNames names)
      : rank(place.rank),
        position(place.position),
        ledger(buffer_id, place.rank, config.num_slots, names),
        pool(MaxMessageBytes(config)) {}

  const int32_t rank;
  const int32_t position;  // in the mesh
  Ledger ledger;
  BlockPool pool;
  std::shared_ptr<Transport> transport;  // of its group
};

class HostBuffer : public Buffer {
 public:
  // With all ranks in this process.
  HostBuffer(int64_t id, const Config& config, const std::vector<std::optional<Place>>& places);
  ~HostBuffer() override { CloseTransports(); }

  // Null for a device outside the buffer's mesh.
  HostRank* RankOf(int32_t device) const;

  void Close() override { CloseTransports(); }
  int64_t MessageBytes(int32_t device) const override;

 protected:
  // The ranks of a group; null for those of other processes.
  using Group = std::vector<std::unique_ptr<HostRank>>;

  // Without transports, which the caller adds.
  HostBuffer(int64_t id, const Config& config, const std::vector<std::optional<Place>>& places,
             RunNames names);

  const std::vector<Group>& groups() const { return groups_; }
  void CloseTransports();

 private:
  void OnFail(const Group& group, int64_t run, const Fault& fault);

  std::vector<Group> groups_;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_HOST_BUFFER_H_
