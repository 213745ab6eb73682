#include "cc/cuda/mover.h"

#include <atomic>

#include "cc/cuda/driver.h"

namespace jax_sm_free::cuda {
namespace {

// How long the thread looks for entries without sleeping after there was a sign of any. A step of a
// program is shorter than this, and a sleep would add its length to an exchange.
constexpr auto kSpinTime = std::chrono::milliseconds(20);
constexpr auto kSleepTime = std::chrono::milliseconds(1);

}  // namespace

Mover::Mover(int device, const RankView& view)
    : device_(device), view_(view), streams_(view.config.ep_size) {
  Wake();
  thread_ = std::thread([this] { Run(); });
}

Mover::~Mover() {
  stop_ = true;
  Wake();
  thread_.join();
}

void Mover::Wake() {
  last_active_ = Clock::now().time_since_epoch().count();
  woken_.notify_one();
}

std::string Mover::Error() {
  const std::lock_guard lock(mutex_);
  return error_;
}

bool Mover::TakeEntry(MailboxEntry& entry) {
  MailboxEntry& slot = view_.mailbox[(next_tag_ - 1) % kMailboxEntries];
  if (std::atomic_ref(slot.tag).load(std::memory_order_acquire) != next_tag_) return false;
  entry = slot;
  ++next_tag_;
  return true;
}

cudaError_t Mover::Issue(const MailboxEntry& entry) {
  const Config& config = view_.config;
  const RegionLayout& regions = view_.regions;
  const int64_t out = int64_t{entry.slot} * config.ep_size + entry.dst;
  const int64_t in = int64_t{entry.slot} * config.ep_size + view_.rank;
  const std::byte* source = view_.base[view_.rank] + regions.stage + out * regions.message_bytes;
  std::byte* target = view_.base[entry.dst] + regions.recv + in * regions.message_bytes;
  const cudaError_t copied =
      cudaMemcpyAsync(target + entry.begin, source + entry.begin, entry.end - entry.begin,
                      cudaMemcpyDeviceToDevice, streams_[entry.dst]);
  if (copied != cudaSuccess) return copied;
  auto* signal = reinterpret_cast<uint64_t*>(view_.base[entry.dst] + regions.signals) + in;
  return WriteBehind(streams_[entry.dst], signal, entry.signal);
}

void Mover::Run() {
  cudaError_t status = cudaSetDevice(device_);
  for (cudaStream_t& stream : streams_) {
    if (status == cudaSuccess) status = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  }
  while (!stop_) {
    MailboxEntry entry;
    if (TakeEntry(entry)) {
      if (status == cudaSuccess) status = Issue(entry);
      if (status != cudaSuccess) {
        const std::lock_guard lock(mutex_);
        if (error_.empty()) error_ = cudaGetErrorString(status);
      }
      last_active_ = Clock::now().time_since_epoch().count();
      continue;
    }
    if (Clock::now().time_since_epoch() - Clock::duration(last_active_) < kSpinTime) continue;
    std::unique_lock lock(mutex_);
    woken_.wait_for(lock, kSleepTime);
  }
  for (cudaStream_t stream : streams_) {
    (void)cudaStreamSynchronize(stream);
    (void)cudaStreamDestroy(stream);
  }
}

}  // namespace jax_sm_free::cuda
