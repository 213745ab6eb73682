#include "cc/cpu/ucx_inbox.h"

#include <cstring>
#include <span>
#include <utility>

namespace jax_sm_free {

void UcxInbox::Listen(UcxWorker& worker) {
  worker_ = &worker;
  ucp_am_handler_param_t param{};
  param.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB |
                     UCP_AM_HANDLER_PARAM_FIELD_ARG | UCP_AM_HANDLER_PARAM_FIELD_FLAGS;
  param.id = 0;
  param.flags = UCP_AM_FLAG_WHOLE_MSG;
  param.cb = &UcxInbox::OnArrival;
  param.arg = this;
  worker.ucx().ucp_worker_set_am_recv_handler(worker.get(), &param);
}

void UcxInbox::Drop(int32_t peer) {
  streams_[peer].dropped = true;
  streams_[peer].early.clear();
}

ucs_status_t UcxInbox::OnArrival(void* self, const void* header, size_t header_bytes, void* data,
                                 size_t data_bytes, const ucp_am_recv_param_t* param) {
  auto* inbox = static_cast<UcxInbox*>(self);
  Frame frame;
  if (!inbox->Accept(header, header_bytes, data_bytes, frame)) return UCS_OK;
  if (!frame.wanted) {
    inbox->Put(std::move(frame));
    return UCS_OK;  // UCX tells the sender that its memory is free again
  }
  if ((param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0) {
    inbox->Fetch(std::move(frame), data);
    return UCS_OK;
  }
  if (data_bytes > 0) std::memcpy(frame.payload.get(), data, data_bytes);
  inbox->Put(std::move(frame));
  return UCS_OK;
}

// Fills in `frame` except for its payload. Returns false if the frame is to be dropped.
bool UcxInbox::Accept(const void* header, size_t header_bytes, size_t data_bytes, Frame& frame) {
  if (header_bytes < sizeof(FramePrefix)) return false;
  std::memcpy(&frame.prefix, header, sizeof(FramePrefix));
  const int32_t source = frame.prefix.source;
  if (source < 0 || source >= static_cast<int32_t>(streams_.size())) return false;
  if (streams_[source].dropped) return false;
  const auto* own = static_cast<const std::byte*>(header);
  frame.header.assign(own + sizeof(FramePrefix), own + header_bytes);
  frame.payload_bytes = static_cast<int64_t>(data_bytes);
  if (data_bytes == 0) return true;
  frame.wanted = !wants_ || wants_(source, frame.header);
  if (!frame.wanted) return true;
  frame.payload = allocate_(source, frame.header, frame.payload_bytes);
  if (frame.payload != nullptr) return true;
  on_broken_(source, "it sent " + std::to_string(data_bytes) + " bytes that have no place here");
  return false;
}

void UcxInbox::Fetch(Frame frame, void* descriptor) {
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.recv_am = &UcxInbox::OnFetched;
  param.user_data = this;
  const UcxLibrary& ucx = worker_->ucx();
  void* request = ucx.ucp_am_recv_data_nbx(worker_->get(), descriptor, frame.payload.get(),
                                           static_cast<size_t>(frame.payload_bytes), &param);
  if (request == nullptr) {
    Put(std::move(frame));
  } else if (UCS_PTR_IS_ERR(request)) {
    on_broken_(frame.prefix.source, ucx.ucs_status_string(UCS_PTR_STATUS(request)));
  } else {
    in_transit_.emplace(request, std::move(frame));
  }
}

void UcxInbox::OnFetched(void* request, ucs_status_t status, size_t /*length*/, void* self) {
  static_cast<UcxInbox*>(self)->FinishFetch(request, status);
}

void UcxInbox::FinishFetch(void* request, ucs_status_t status) {
  auto node = in_transit_.extract(request);
  const UcxLibrary& ucx = worker_->ucx();
  ucx.ucp_request_free(request);
  if (status == UCS_OK) {
    Put(std::move(node.mapped()));
  } else {
    on_broken_(node.mapped().prefix.source, ucx.ucs_status_string(status));
  }
}

void UcxInbox::Put(Frame frame) {
  Stream& stream = streams_[frame.prefix.source];
  if (stream.dropped) return;
  if (frame.prefix.sequence != stream.next_sequence) {
    stream.early.emplace(frame.prefix.sequence, std::move(frame));
    return;
  }
  ++stream.next_sequence;
  on_frame_(std::move(frame));
  for (auto next = stream.early.begin();
       next != stream.early.end() && next->first == stream.next_sequence;
       next = stream.early.begin()) {
    Frame early = std::move(next->second);
    stream.early.erase(next);
    ++stream.next_sequence;
    on_frame_(std::move(early));
  }
}

}  // namespace jax_sm_free
