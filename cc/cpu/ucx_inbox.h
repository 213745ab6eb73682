// The receiving half of a UCX wire: it puts frames into memory of the receiver and into order.

#ifndef JAX_SM_FREE_CC_CPU_UCX_INBOX_H_
#define JAX_SM_FREE_CC_CPU_UCX_INBOX_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "cc/cpu/block_pool.h"
#include "cc/cpu/ucx_frame.h"
#include "cc/cpu/ucx_worker.h"
#include "cc/cpu/wire.h"

namespace jax_sm_free {

// UCX delivers frames in any order: it announces a large frame and fetches it later, so small
// frames overtake it. The inbox keeps frames that come early.
//
// Only the thread that drives the worker may call this. It must outlive the worker, which writes
// into blocks that are held here. Callbacks come from within UCX, so they must not call UCX.
class UcxInbox {
 public:
  struct Frame {
    FramePrefix prefix;
    std::vector<std::byte> header;
    BlockPool::Block payload;
    int64_t payload_bytes = 0;
    // False for a frame that has no payload, and only keeps its place in the order.
    bool wanted = true;
  };
  using OnFrame = std::function<void(Frame frame)>;
  using OnBroken = std::function<void(int32_t peer, const std::string& reason)>;

  // Of `callbacks`, it uses `wants` and `allocate`.
  UcxInbox(int32_t num_peers, const Wire::Callbacks& callbacks, OnFrame on_frame,
           OnBroken on_broken)
      : streams_(num_peers),
        wants_(callbacks.wants),
        allocate_(callbacks.allocate),
        on_frame_(std::move(on_frame)),
        on_broken_(std::move(on_broken)) {}

  // Receives frames that come to `worker`.
  void Listen(UcxWorker& worker);

  // Ignores all further frames of `peer`.
  void Drop(int32_t peer);

 private:
  struct Stream {
    uint64_t next_sequence = 0;
    std::map<uint64_t, Frame> early;
    bool dropped = false;
  };

  static ucs_status_t OnArrival(void* self, const void* header, size_t header_bytes, void* data,
                                size_t data_bytes, const ucp_am_recv_param_t* param);
  static void OnFetched(void* request, ucs_status_t status, size_t length, void* self);
  bool Accept(const void* header, size_t header_bytes, size_t data_bytes, Frame& frame);
  void Fetch(Frame frame, void* descriptor);
  void FinishFetch(void* request, ucs_status_t status);
  void Put(Frame frame);

  UcxWorker* worker_ = nullptr;
  std::vector<Stream> streams_;                  // by process
  std::unordered_map<void*, Frame> in_transit_;  // by request: payloads that UCX writes
  const decltype(Wire::Callbacks::wants) wants_;
  const decltype(Wire::Callbacks::allocate) allocate_;
  const OnFrame on_frame_;
  const OnBroken on_broken_;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_UCX_INBOX_H_
