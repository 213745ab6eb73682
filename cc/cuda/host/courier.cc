#include "cc/cuda/host/courier.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstring>
#include <string>
#include <utility>

namespace jax_sm_free::cuda {
namespace {

uint64_t LoadAcquire(std::byte* address) {
  return std::atomic_ref(*reinterpret_cast<uint64_t*>(address)).load(std::memory_order_acquire);
}

}  // namespace

Courier::Courier(Nvshmem* nvshmem, std::vector<int32_t> pes)
    : nvshmem_(nvshmem), pes_(std::move(pes)), outboxes_(pes_.size()), sent_(pes_.size()) {}

Result<std::shared_ptr<Courier>> Courier::Make(Nvshmem* nvshmem, const RegionLayout& regions,
                                               std::vector<int32_t> pes) {
  std::shared_ptr<Courier> courier(new Courier(nvshmem, std::move(pes)));
  if (auto fault = courier->Open(regions)) return *fault;
  return courier;
}

std::optional<Fault> Courier::Open(const RegionLayout& regions) {
  const auto bytes = static_cast<size_t>(regions.recv);  // all that stands before the messages
  for (size_t dst = 0; dst < pes_.size(); ++dst) {
    if (pes_[dst] < 0) continue;
    void* outbox = nullptr;
    if (const cudaError_t error = cudaHostAlloc(&outbox, bytes, cudaHostAllocPortable);
        error != cudaSuccess) {
      return Fault{.op = "Buffer",
                   .expected = std::to_string(bytes) + " bytes of pinned memory",
                   .seen = cudaGetErrorString(error),
                   .exchange = {}};
    }
    std::memset(outbox, 0, bytes);
    if (auto fault = nvshmem_->Register(outbox, bytes)) {
      (void)cudaFreeHost(outbox);
      return fault;
    }
    outboxes_[dst] = static_cast<std::byte*>(outbox);
  }
  return std::nullopt;
}

Courier::~Courier() {
  for (std::byte* outbox : outboxes_) {
    if (outbox == nullptr) continue;
    nvshmem_->Unregister(outbox);
    (void)cudaFreeHost(outbox);
  }
}

void Courier::Send(const RankView& view, const CopyOrder& order) {
  const RegionLayout& regions = view.regions;
  std::byte* own = view.base[view.rank];
  const int64_t in = int64_t{order.slot} * view.config.ep_size + view.rank;
  std::byte* target = own + regions.recv + in * regions.message_bytes;
  for (const Piece& piece : PiecesOf(view, order)) {
    nvshmem_->Put(target + piece.begin, own + piece.source, piece.bytes, pes_[order.dst]);
  }
  nvshmem_->PutSignal(own + regions.signals + in * 8, order.signal, pes_[order.dst]);
}

bool Courier::Forward(const RankView& view) {
  const RegionLayout& regions = view.regions;
  std::byte* own = view.base[view.rank];
  bool found = false;
  for (int32_t dst = 0; dst < view.config.ep_size; ++dst) {
    if (!Serves(dst)) continue;
    const std::byte* outbox = outboxes_[dst];
    for (int32_t slot = 0; slot < view.config.num_slots; ++slot) {
      const int64_t in = int64_t{slot} * view.config.ep_size + view.rank;
      const auto news = [&](int64_t offset, uint64_t& sent) {
        const uint64_t value = LoadAcquire(outboxes_[dst] + offset);
        return value != std::exchange(sent, value);
      };
      const int64_t noticed = regions.noticed + in * 8;
      if (news(noticed, sent_[dst].notices[slot])) {
        const int64_t notice = regions.notices + in * regions.notice_bytes;
        nvshmem_->PutAndWait(own + notice, outbox + notice, regions.notice_bytes, pes_[dst]);
        nvshmem_->PutSignal(own + noticed, sent_[dst].notices[slot], pes_[dst]);
        found = true;
      }
      const int64_t ack = regions.acks + in * 8;
      if (news(ack, sent_[dst].acks[slot])) {
        nvshmem_->PutSignal(own + ack, sent_[dst].acks[slot], pes_[dst]);
        found = true;
      }
    }
  }
  return found;
}

}  // namespace jax_sm_free::cuda
