#include "cc/cuda/host/mover.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <optional>
#include <utility>

#include "cc/cuda/host/driver.h"
#include "cc/cuda/host/status_fault.h"
#include "cc/fault_texts.h"

namespace jax_sm_free::cuda {
namespace {

// How long the thread looks for orders, without sleeping, after the last sign of one. A step of a
// program is shorter than this. A sleep would make an exchange longer.
constexpr auto kSpinTime = std::chrono::milliseconds(20);
constexpr auto kSleepTime = std::chrono::milliseconds(1);

// The next copy is enqueued so long before the end of the copy before.
constexpr std::chrono::microseconds kLead{6};

// The time that a copy of no bytes would take.
constexpr std::chrono::microseconds kStartUp{3};

// The numbers of orders wrap around. An order that is so far ahead is one of the round before.
constexpr uint32_t kFarAhead = uint32_t{1} << 31;

constexpr int64_t kMeasuredBytes = int64_t{64} << 20;

}  // namespace

Mover::Mover(int device, const RankView& view, std::shared_ptr<Crossbar> crossbar,
             std::shared_ptr<Courier> courier, std::shared_ptr<GroupEnd> group_end, uint64_t* done)
    : device_(device),
      view_(view),
      crossbar_(std::move(crossbar)),
      courier_(std::move(courier)),
      group_end_(std::move(group_end)),
      done_(done),
      streams_(view.config.ep_size),
      seconds_per_byte_(view.config.ep_size) {
  if (const cudaError_t status = Prepare(); status != cudaSuccess) Fail(status);
  Wake();
  thread_ = std::thread([this] { Run(); });
}

Mover::~Mover() {
  stop_ = true;
  Wake();
  thread_.join();
}

void Mover::Wake() {
  if (view_.config.ep_size == 1) return;
  last_active_ = Clock::now().time_since_epoch().count();
  woken_.notify_one();
}

std::optional<Fault> Mover::CopyFault() {
  const std::lock_guard lock(mutex_);
  return copy_fault_;
}

bool Mover::TakeOrder() {
  MailboxEntry& entry = view_.mailbox[num_orders_ % kMailboxEntries];
  std::array<uint32_t, MailboxEntry::kWords> words;
  for (size_t i = 0; i < words.size(); ++i) {
    const uint64_t word = std::atomic_ref(entry.words[i]).load(std::memory_order_acquire);
    const auto ahead = static_cast<uint32_t>(word >> 32) - static_cast<uint32_t>(num_orders_ + 1);
    if (ahead != 0) {
      // The mailbox went round while the driver held this thread up. The destinations have read the
      // messages of the orders that were lost where these were packed.
      if (ahead < kFarAhead) num_orders_ += ahead;
      return false;
    }
    words[i] = static_cast<uint32_t>(word);
  }
  ++num_orders_;
  if (!failed_) Accept(std::bit_cast<CopyOrder>(words));
  return true;
}

void Mover::Accept(const CopyOrder& order) {
  if (IsForCourier(DestinationOf(order))) {
    courier_->Send(view_, order);
  } else {
    waiting_.push_back(order);
  }
}

bool Mover::IsDone(const Copy& copy) const {
  return copy.dst < 0 ||
         std::atomic_ref(done_[copy.dst]).load(std::memory_order_acquire) >= copy.number;
}

void Mover::ReleaseLink() {
  if (on_its_way_.dst >= 0) crossbar_->Release(on_its_way_.dst, on_its_way_.ticket);
}

bool Mover::FinishCopy() {
  Copy& copy = on_its_way_;
  if (copy.dst < 0) return false;
  const Clock::time_point now = Clock::now();
  // This copy cannot have begun while the copy before still runs.
  if (!IsDone(before_)) copy.end = std::max(copy.end, now + copy.length);
  if (now + kLead < copy.end && !IsDone(copy)) return false;
  ReleaseLink();
  before_ = std::exchange(copy, {});
  return true;
}

bool Mover::StartCopy() {
  if (on_its_way_.dst >= 0) return false;
  if (waiting_.empty()) return false;
  const CopyOrder order = waiting_.front();
  const int32_t dst = DestinationOf(order);
  const Crossbar::Ticket ticket = crossbar_->TryTake(dst);
  if (ticket == 0) return false;
  waiting_.pop_front();
  const auto seconds = std::chrono::duration<double>(seconds_per_byte_[dst] *
                                                     static_cast<double>(order.end - order.begin));
  on_its_way_.dst = dst;
  on_its_way_.ticket = ticket;
  on_its_way_.number = before_.number + 1;
  on_its_way_.length = std::chrono::duration_cast<Clock::duration>(seconds);
  for (const Piece& piece : PiecesOf(view_, order)) {
    if (piece.bytes > 0) on_its_way_.length += kStartUp;
  }
  on_its_way_.end = Clock::now() + on_its_way_.length;
  const cudaError_t status = Issue(order, on_its_way_.number);
  if (status != cudaSuccess) Fail(status);
  return true;
}

cudaError_t Mover::Issue(const CopyOrder& order, uint64_t number) {
  const Target target = TargetOf(view_, order);
  std::byte* region = view_.base[target.rank];
  cudaStream_t stream = streams_[target.rank];
  for (const Piece& piece : PiecesOf(view_, order)) {
    if (piece.bytes == 0) continue;
    const cudaError_t copied = cudaMemcpyAsync(region + target.message + piece.begin,
                                               view_.base[view_.rank] + piece.source, piece.bytes,
                                               cudaMemcpyDeviceToDevice, stream);
    if (copied != cudaSuccess) return copied;
  }
  auto* signal = reinterpret_cast<uint64_t*>(region + target.signal);
  return WriteBehind(stream, {{{signal, order.signal}, {done_ + target.rank, number}}});
}

// The mover copies nothing from then on. Peers read messages where they were packed, until a call
// or a check raises the fault.
void Mover::Fail(cudaError_t status) {
  failed_ = true;
  waiting_.clear();
  ReleaseLink();
  on_its_way_ = {};
  const std::lock_guard lock(mutex_);
  if (copy_fault_) return;
  copy_fault_ = Fault{.op = "copy",
                      .rank = view_.rank,
                      .expected = "success",
                      .seen = cudaGetErrorString(status),
                      .exchange = {}};
  jax_sm_free::TellFault(*copy_fault_);
}

cudaError_t Mover::MeasureLink(int32_t dst) {
  const RegionLayout& regions = view_.regions;
  const int64_t bytes = std::min(regions.total - regions.recv, kMeasuredBytes);
  cudaStream_t stream = streams_[dst];
  cudaEvent_t start = nullptr;
  cudaEvent_t stop = nullptr;
  float milliseconds = 0;
  Crossbar::Ticket ticket = 0;
  while ((ticket = crossbar_->TryTake(dst)) == 0) std::this_thread::yield();
  (void)cudaEventCreate(&start);
  (void)cudaEventCreate(&stop);
  for (int i = 0; i < 2; ++i) {  // the first copy warms up
    (void)cudaEventRecord(start, stream);
    (void)cudaMemcpyAsync(view_.base[dst] + regions.recv, view_.base[view_.rank] + regions.recv,
                          bytes, cudaMemcpyDeviceToDevice, stream);
    (void)cudaEventRecord(stop, stream);
    (void)cudaEventSynchronize(stop);
  }
  crossbar_->Release(dst, ticket);
  (void)cudaEventElapsedTime(&milliseconds, start, stop);
  (void)cudaEventDestroy(start);
  (void)cudaEventDestroy(stop);
  seconds_per_byte_[dst] = milliseconds * 1e-3 / static_cast<double>(bytes);
  return cudaGetLastError();
}

cudaError_t Mover::Prepare() {
  cudaError_t status = cudaSetDevice(device_);
  for (int32_t lane = 0; lane < view_.messages.num_lanes && status == cudaSuccess; ++lane) {
    const int32_t dst = view_.messages.end[view_.messages.of_lane[lane]].rank;
    if (dst == view_.rank || IsForCourier(dst)) continue;
    status = cudaStreamCreateWithFlags(&streams_[dst], cudaStreamNonBlocking);
    if (status == cudaSuccess) status = MeasureLink(dst);
  }
  return status;
}

// Tells the user which rank waits for which one, if a kernel on this GPU waits for long.
void Mover::TellSlowWait() {
  FaultRecord& record = view_.status->slow_wait;
  const std::optional<Fault> fault = FaultIn(record, view_, kSlowWaitSeconds);
  if (!fault) return;
  jax_sm_free::TellSlowWait(*fault);
  record.code = 0;
  std::atomic_ref(record.claimed).store(0, std::memory_order_release);
}

// Tells the user of this rank's fault. Another rank tells of a fault from which this one follows.
void Mover::TellFault() {
  if (has_seen_fault_) return;
  FaultRecord& record = view_.status->fault;
  const std::optional<Fault> fault = FaultIn(record, view_, view_.config.timeout_s);
  has_seen_fault_ = fault.has_value();
  if (!fault || IsEcho(record)) return;
  jax_sm_free::TellFault(*fault);
  if (group_end_ != nullptr) group_end_->TellFault(fault->Describe());
}

void Mover::HearOfEnd() {
  if (group_end_ == nullptr || !group_end_->HasCome()) return;
  std::atomic_ref(view_.status->stopped).store(1, std::memory_order_release);
}

void Mover::Run() {
  (void)cudaSetDevice(device_);
  while (!stop_) {
    TellSlowWait();
    TellFault();
    HearOfEnd();
    bool active = TakeOrder();
    active |= FinishCopy();
    active |= StartCopy();
    if (courier_ != nullptr) active |= courier_->Forward(view_);
    if (active) last_active_ = Clock::now().time_since_epoch().count();
    const bool busy = on_its_way_.dst >= 0 || !waiting_.empty();
    if (busy || Clock::now().time_since_epoch() - Clock::duration(last_active_) < kSpinTime) {
      continue;
    }
    std::unique_lock lock(mutex_);
    woken_.wait_for(lock, kSleepTime);
  }
  ReleaseLink();
  for (cudaStream_t stream : streams_) {
    if (stream == nullptr) continue;
    (void)cudaStreamSynchronize(stream);
    (void)cudaStreamDestroy(stream);
  }
}

}  // namespace jax_sm_free::cuda
