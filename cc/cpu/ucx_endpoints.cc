#include "cc/cpu/ucx_endpoints.h"

namespace jax_sm_free {

UcxEndpoints::UcxEndpoints(UcxWorker& worker, int32_t num_peers, OnError on_error)
    : worker_(worker), on_error_(std::move(on_error)), endpoints_(num_peers) {
  for (int32_t peer = 0; peer < num_peers; ++peer) routes_.push_back({this, peer});
}

void UcxEndpoints::Open(int32_t peer, const std::string& address) {
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                      UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = reinterpret_cast<const ucp_address_t*>(address.data());
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler.cb = &UcxEndpoints::OnEndpointError;
  params.err_handler.arg = &routes_[peer];
  const UcxLibrary& ucx = worker_.ucx();
  const ucs_status_t status = ucx.ucp_ep_create(worker_.get(), &params, &endpoints_[peer]);
  if (status == UCS_OK) return;
  endpoints_[peer] = nullptr;
  on_error_(peer, ucx.ucs_status_string(status));
}

void UcxEndpoints::Close(int32_t peer) {
  ucp_ep_h endpoint = std::exchange(endpoints_[peer], nullptr);
  if (endpoint == nullptr) return;
  ucp_request_param_t param{};
  param.op_attr_mask =
      UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.flags = UCP_EP_CLOSE_FLAG_FORCE;
  param.cb.send = &UcxEndpoints::OnClosed;
  param.user_data = this;
  void* request = worker_.ucx().ucp_ep_close_nbx(endpoint, &param);
  if (UCS_PTR_IS_PTR(request)) ++num_closing_;
}

void UcxEndpoints::OnEndpointError(void* route, ucp_ep_h /*endpoint*/, ucs_status_t status) {
  const auto& [self, peer] = *static_cast<Route*>(route);
  self->on_error_(peer, self->worker_.ucx().ucs_status_string(status));
}

void UcxEndpoints::OnClosed(void* request, ucs_status_t /*status*/, void* self) {
  auto* endpoints = static_cast<UcxEndpoints*>(self);
  --endpoints->num_closing_;
  endpoints->worker_.ucx().ucp_request_free(request);
}

}  // namespace jax_sm_free
