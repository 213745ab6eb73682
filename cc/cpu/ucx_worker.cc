#include "cc/cpu/ucx_worker.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "cc/cpu/ucx_frame.h"

namespace jax_sm_free {
namespace {

using Setting = std::pair<std::string, std::string>;

// The settings that differ from the defaults of UCX.
std::vector<Setting> Settings(const UcxWorker::Options& options) {
  const long timeout_s = std::max(1L, std::lround(options.link_timeout_s));
  std::vector<Setting> settings{
      // Payloads are host memory, so the modules for GPUs would only start a driver. UCX prefers
      // System V shared memory to POSIX's. POSIX's would still take 4 MB of /dev/shm, and where a
      // container has less than that, a signal would end the process.
      {"TLS", "^cuda,posix"},
      // Without these, an endpoint that reports dead peers would not use shared memory.
      {"POSIX_ERROR_HANDLING", "y"},
      {"SYSV_ERROR_HANDLING", "y"},
      // How often UCX checks whether a process of this host is still there.
      {"KEEPALIVE_INTERVAL", "1s"},
      // The first three are for idle connections, and the last one is also for bytes under way.
      {"TCP_KEEPIDLE", "1s"},
      {"TCP_KEEPINTVL", "1s"},
      {"TCP_KEEPCNT", std::to_string(std::max(1L, timeout_s - 1))},
      {"TCP_USER_TIMEOUT", std::to_string(timeout_s) + "s"},
      // Without this, the thread that drives the worker hangs in connect() for as long as a host
      // that drops packets is silent.
      {"TCP_CONN_NB", "y"},
      // A payload travels in segments. Each of them costs a system call or a wake-up.
      {"TCP_TX_SEG_SIZE", "256K"},
      {"TCP_RX_SEG_SIZE", "256K"},
      {"SYSV_SEG_SIZE", "32K"},
      // By default, UCX does not use TCP for groups of more than 256 processes.
      {"TCP_MAX_NUM_EPS", "inf"},
  };
  settings.insert(settings.end(), options.settings.begin(), options.settings.end());
  return settings;
}

Fault OpenFault(const std::string& what, const char* seen) {
  return {.op = "ucx", .expected = what, .seen = seen, .exchange = {}};
}

}  // namespace

Result<std::unique_ptr<UcxWorker>> UcxWorker::Open(std::shared_ptr<const UcxLibrary> ucx,
                                                   const Options& options) {
  std::unique_ptr<UcxWorker> worker(new UcxWorker(std::move(ucx)));
  const UcxLibrary& lib = *worker->ucx_;
  ucs_status_t status = worker->OpenContext(options);
  if (status != UCS_OK) return OpenFault("a UCX context", lib.ucs_status_string(status));
  status = worker->OpenWorker();
  if (status == UCS_OK) status = worker->AskWorker();
  if (status != UCS_OK) return OpenFault("a UCX worker", lib.ucs_status_string(status));
  worker->wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (worker->wake_ < 0) return OpenFault("an eventfd", std::strerror(errno));
  return worker;
}

ucs_status_t UcxWorker::OpenContext(const Options& options) {
  // UCX reads this when it loads modules, which is at the first context.
  if (std::getenv("UCX_MODULES") == nullptr) ucx_->ucs_global_opts_set_value("MODULES", "^cuda");
  ucp_config_t* config = nullptr;
  ucs_status_t status = ucx_->ucp_config_read(nullptr, nullptr, &config);
  if (status != UCS_OK) return status;
  for (const auto& [name, value] : Settings(options)) {
    if (std::getenv(("UCX_" + name).c_str()) != nullptr) continue;
    status = ucx_->ucp_config_modify(config, name.c_str(), value.c_str());
    if (status != UCS_OK) break;
  }
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_ESTIMATED_NUM_EPS;
  params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  params.estimated_num_eps = static_cast<size_t>(options.num_peers);
  if (status == UCS_OK) {
    status = ucx_->ucp_init_version(UCP_API_MAJOR, UCP_API_MINOR, &params, config, &context_);
  }
  ucx_->ucp_config_release(config);
  return status;
}

ucs_status_t UcxWorker::OpenWorker() {
  ucp_worker_params_t params{};
  params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  const ucs_status_t status = ucx_->ucp_worker_create(context_, &params, &worker_);
  if (status != UCS_OK) return status;
  return ucx_->ucp_worker_get_efd(worker_, &events_);
}

ucs_status_t UcxWorker::AskWorker() {
  ucp_worker_attr_t attr{};
  attr.field_mask = UCP_WORKER_ATTR_FIELD_ADDRESS | UCP_WORKER_ATTR_FIELD_MAX_AM_HEADER;
  const ucs_status_t status = ucx_->ucp_worker_query(worker_, &attr);
  if (status != UCS_OK) return status;
  address_.assign(reinterpret_cast<const char*>(attr.address), attr.address_length);
  ucx_->ucp_worker_release_address(worker_, attr.address);
  return attr.max_am_header < kMaxFrameHeaderBytes ? UCS_ERR_EXCEEDS_LIMIT : UCS_OK;
}

UcxWorker::~UcxWorker() {
  Close();
  if (wake_ >= 0) close(wake_);
}

void UcxWorker::Wait(int timeout_ms) {
  // Fails if something has happened since the last call of progress.
  if (ucx_->ucp_worker_arm(worker_) != UCS_OK) return;
  std::array<pollfd, 2> fds{{{events_, POLLIN, 0}, {wake_, POLLIN, 0}}};
  if (poll(fds.data(), fds.size(), timeout_ms) > 0 && (fds[1].revents & POLLIN) != 0) {
    eventfd_t count = 0;
    (void)eventfd_read(wake_, &count);
  }
}

void UcxWorker::Wake() const { (void)eventfd_write(wake_, 1); }

void UcxWorker::Close() {
  if (worker_ != nullptr) ucx_->ucp_worker_destroy(worker_);
  worker_ = nullptr;
  if (context_ != nullptr) ucx_->ucp_cleanup(context_);
  context_ = nullptr;
}

}  // namespace jax_sm_free
