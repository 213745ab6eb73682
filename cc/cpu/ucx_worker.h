// A UCX worker that is set up for a wire, and the ways to wait for it.

#ifndef JAX_SM_FREE_CC_CPU_UCX_WORKER_H_
#define JAX_SM_FREE_CC_CPU_UCX_WORKER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cc/cpu/ucx_library.h"
#include "cc/fault.h"

namespace jax_sm_free {

// One thread at a time may call this, except for Wake.
class UcxWorker {
 public:
  // UCX_... variables of the environment take precedence over these.
  struct Options {
    int64_t num_peers = 1;
    // A TCP connection is broken if the other host has not answered for this long. A process that
    // died is noticed within about a second.
    double link_timeout_s = 5.0;
    // Further variables, without the prefix UCX_, and their values.
    std::vector<std::pair<std::string, std::string>> settings = {};
  };

  static Result<std::unique_ptr<UcxWorker>> Open(std::shared_ptr<const UcxLibrary> ucx,
                                                 const Options& options);
  ~UcxWorker();
  UcxWorker(const UcxWorker&) = delete;
  UcxWorker& operator=(const UcxWorker&) = delete;

  const UcxLibrary& ucx() const { return *ucx_; }
  ucp_worker_h get() const { return worker_; }
  const std::string& address() const { return address_; }

  // Returns whether anything happened.
  bool Progress() { return ucx_->ucp_worker_progress(worker_) != 0; }

  // Blocks until there may be progress, until Wake is called, or until the time is over.
  void Wait(int timeout_ms);

  // Ends a Wait; if nobody waits, the next Wait ends at once.
  void Wake() const;

  // Ends the worker: no Progress or Wait afterwards. UCX ends what is still under way by callbacks,
  // which may use ucx().
  void Close();

 private:
  explicit UcxWorker(std::shared_ptr<const UcxLibrary> ucx) : ucx_(std::move(ucx)) {}
  ucs_status_t OpenContext(const Options& options);
  ucs_status_t OpenWorker();
  ucs_status_t AskWorker();

  const std::shared_ptr<const UcxLibrary> ucx_;
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  std::string address_;
  int events_ = -1;  // readable when there may be progress
  int wake_ = -1;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_UCX_WORKER_H_
