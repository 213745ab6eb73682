// The receiving half of a UCX wire: frames, put into memory of the receiver's and into order.

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

// UCX hands frames over in any order: a large one is announced first and fetched then, and small
// ones overtake it. The inbox keeps what comes early.
//
// For the thread that drives the worker. Must outlive the worker, which writes into blocks held
// here. Callbacks come from within UCX: they must not call it.
class UcxInbox {
 public:
  struct Frame {
    FramePrefix prefix;
    std::vector<std::byte> header;
    BlockPool::Block payload;
    int64_t payload_bytes = 0;
    bool wanted = true;  // if not, there is no payload, and it only keeps its place in the order
  };
  using OnFrame = std::function<void(Frame frame)>;
  using OnBroken = std::function<void(int32_t peer, const std::string& reason)>;

  // `callbacks`: of these, `wants` and `allocate`.
  UcxInbox(int32_t num_peers, const Wire::Callbacks& callbacks, OnFrame on_frame,
           OnBroken on_broken)
      : streams_(num_peers),
        wants_(callbacks.wants),
        allocate_(callbacks.allocate),
        on_frame_(std::move(on_frame)),
        on_broken_(std::move(on_broken)) {}

  // Receives what comes to `worker`.
  void Listen(UcxWorker& worker);

  // Nothing more of `peer` is wanted.
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
