#include "cc/cuda/host/courier.h"

#include <atomic>
#include <utility>

namespace jax_sm_free::cuda {
namespace {

// The word that a kernel has written, if it is not the one that was sent last.
std::optional<uint64_t> TakeNews(std::byte* word, uint64_t& sent) {
  const uint64_t value =
      std::atomic_ref(*reinterpret_cast<uint64_t*>(word)).load(std::memory_order_acquire);
  if (value == std::exchange(sent, value)) return std::nullopt;
  return value;
}

}  // namespace

Courier::Courier(std::unique_ptr<RemoteRegions> remote, int32_t ep_size)
    : remote_(std::move(remote)), outboxes_(ep_size) {}

Result<std::shared_ptr<Courier>> Courier::Make(std::unique_ptr<RemoteRegions> remote,
                                               const Config& config) {
  std::shared_ptr<Courier> courier(new Courier(std::move(remote), config.ep_size));
  if (auto fault = courier->MakeOutboxes(RegionsOf(config))) return *fault;
  return courier;
}

std::optional<Fault> Courier::MakeOutboxes(const RegionLayout& regions) {
  for (size_t dst = 0; dst < outboxes_.size(); ++dst) {
    if (!remote_->Serves(static_cast<int32_t>(dst))) continue;
    const Result<std::byte*> made = remote_->MakeOutbox(static_cast<size_t>(regions.recv));
    if (const Fault* fault = FaultOf(made)) return *fault;
    outboxes_[dst].front = std::get<std::byte*>(made);
  }
  return std::nullopt;
}

void Courier::Send(const RankView& view, const CopyOrder& order) {
  const Target target = TargetOf(view, order);
  for (const Piece& piece : PiecesOf(view, order)) {
    if (piece.bytes == 0) continue;
    remote_->Put(target.rank, target.message + piece.begin, view.base[view.rank] + piece.source,
                 piece.bytes);
  }
  remote_->PutSignal(target.rank, target.signal, order.signal);
}

bool Courier::Forward(const RankView& view) {
  bool found = false;
  for (int32_t slot = 0; slot < view.config.num_slots; ++slot) {
    for (int32_t message = 0; message < view.regions.num_messages; ++message) {
      if (Serves(view.messages.end[message].rank)) found |= ForwardNotice(view, message, slot);
    }
    for (int32_t dst = 0; dst < view.config.ep_size; ++dst) {
      if (Serves(dst)) found |= ForwardAck(view, dst, slot);
    }
  }
  return found;
}

bool Courier::ForwardNotice(const RankView& view, int32_t message, int32_t slot) {
  const OtherEnd& end = view.messages.end[message];
  std::byte* front = outboxes_[end.rank].front;
  const int64_t entry = MessageIndex(view, slot, end.message);
  const int64_t noticed = view.regions.noticed + entry * 8;
  const std::optional<uint64_t> news = TakeNews(front + noticed, noticed_[message][slot]);
  if (!news) return false;
  const int64_t bytes = view.regions.notice_bytes;
  const int64_t notice = view.regions.notices + entry * bytes;
  remote_->PutAndWait(end.rank, notice, front + notice, bytes);
  remote_->PutSignal(end.rank, noticed, *news);
  return true;
}

bool Courier::ForwardAck(const RankView& view, int32_t dst, int32_t slot) {
  Outbox& outbox = outboxes_[dst];
  const int64_t ack = view.regions.acks + MessageIndex(view, slot, view.rank) * 8;
  const std::optional<uint64_t> news = TakeNews(outbox.front + ack, outbox.acks[slot]);
  if (!news) return false;
  remote_->PutSignal(dst, ack, *news);
  return true;
}

}  // namespace jax_sm_free::cuda
