// UCX, loaded when it is needed: without it, all other transports work.

#ifndef JAX_SM_FREE_CC_CPU_UCX_LIBRARY_H_
#define JAX_SM_FREE_CC_CPU_UCX_LIBRARY_H_

#include <ucp/api/ucp.h>
#include <ucs/config/global_opts.h>

#include <memory>
#include <string>

#include "cc/fault.h"

namespace jax_sm_free {

// The functions of UCX that are used here, under their own names.
#define SMF_UCX_FUNCTIONS(F)        \
  F(ucp_am_recv_data_nbx)           \
  F(ucp_am_send_nbx)                \
  F(ucp_cleanup)                    \
  F(ucp_config_modify)              \
  F(ucp_config_read)                \
  F(ucp_config_release)             \
  F(ucp_ep_close_nbx)               \
  F(ucp_ep_create)                  \
  F(ucp_init_version)               \
  F(ucp_request_free)               \
  F(ucp_worker_arm)                 \
  F(ucp_worker_create)              \
  F(ucp_worker_destroy)             \
  F(ucp_worker_get_efd)             \
  F(ucp_worker_progress)            \
  F(ucp_worker_query)               \
  F(ucp_worker_release_address)     \
  F(ucp_worker_set_am_recv_handler) \
  F(ucs_global_opts_set_value)      \
  F(ucs_status_string)

struct UcxLibrary {
#define SMF_UCX_POINTER(name) \
  decltype(&::name) name = nullptr;  // NOLINT(bugprone-macro-parentheses)
  SMF_UCX_FUNCTIONS(SMF_UCX_POINTER)
#undef SMF_UCX_POINTER

  // `path` is that of libucp.so.0. It is never unloaded, because UCX has threads and exit handlers
  // of its own.
  static Result<std::shared_ptr<const UcxLibrary>> Load(const std::string& path);
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_UCX_LIBRARY_H_
