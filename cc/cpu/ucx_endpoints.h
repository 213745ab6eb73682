// The UCX endpoints of a wire: one to each peer.

#ifndef JAX_SM_FREE_CC_CPU_UCX_ENDPOINTS_H_
#define JAX_SM_FREE_CC_CPU_UCX_ENDPOINTS_H_

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cc/cpu/ucx_worker.h"

namespace jax_sm_free {

// Only the thread that drives the worker may call this, except for the constructor.
class UcxEndpoints {
 public:
  // UCX may call this from within a call of UCX, where an endpoint must not be closed.
  using OnError = std::function<void(int32_t peer, const std::string& reason)>;

  UcxEndpoints(UcxWorker& worker, int32_t num_peers, OnError on_error);

  // A failure is an error of the endpoint.
  void Open(int32_t peer, const std::string& address);

  // Null before Open and after Close.
  ucp_ep_h to(int32_t peer) const { return endpoints_[peer]; }

  // Cancels what is under way. The cancelled operations and the close itself end by callbacks.
  void Close(int32_t peer);
  bool AnyClosing() const { return num_closing_ > 0; }

 private:
  struct Route {  // from an endpoint's error to OnError
    UcxEndpoints* endpoints;
    int32_t peer;
  };

  static void OnEndpointError(void* route, ucp_ep_h endpoint, ucs_status_t status);
  static void OnClosed(void* request, ucs_status_t status, void* self);

  UcxWorker& worker_;
  const OnError on_error_;
  std::vector<ucp_ep_h> endpoints_;  // by process
  std::vector<Route> routes_;        // by process
  int64_t num_closing_ = 0;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_UCX_ENDPOINTS_H_
