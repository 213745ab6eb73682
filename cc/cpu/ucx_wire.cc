#include "cc/cpu/ucx_wire.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace jax_sm_free {
namespace {

using std::chrono::duration;

// How long the thread looks for more work before it sleeps: about as long as waking up takes.
constexpr std::chrono::microseconds kSpin(20);

// UCX notices dead processes only while it is driven.
constexpr int kMaxSleepMs = 500;
constexpr int kMaxSleepClosingMs = 20;

// How long UCX may take to cancel what is under way. This needs no peer.
constexpr std::chrono::seconds kCancel(2);

// Limits how many messages are read to find those that a dead process sent before: other processes
// may go on sending.
constexpr int kMaxDrain = 1000;

constexpr char kClosed[] = "it closed its end";

// The address for peers: how UCX reaches this process, and which process it is.
std::string EncodeAddress(const std::string& process, const std::string& ucx_address) {
  return process + '\n' + ucx_address;
}

struct Address {
  std::string process;
  std::string ucx_address;
};

Address DecodeAddress(const std::string& address) {
  const size_t end = address.find('\n');
  return {address.substr(0, end), address.substr(end + 1)};
}

}  // namespace

Result<std::unique_ptr<UcxWire>> UcxWire::Open(const Options& options, Callbacks callbacks) {
  const auto with_rank = [&options](Fault fault) {
    fault.rank = options.self;
    return fault;
  };
  Result<std::shared_ptr<const UcxLibrary>> ucx = UcxLibrary::Load(options.library);
  if (const Fault* fault = FaultOf(ucx)) return with_rank(*fault);
  Result<std::unique_ptr<UcxWorker>> worker =
      UcxWorker::Open(std::get<0>(ucx), {.num_peers = options.num_peers,
                                         .link_timeout_s = options.link_timeout_s,
                                         .settings = options.settings});
  if (const Fault* fault = FaultOf(worker)) return with_rank(*fault);
  return std::unique_ptr<UcxWire>(
      new UcxWire(options, std::move(callbacks), std::move(std::get<0>(worker))));
}

UcxWire::UcxWire(const Options& options, Callbacks callbacks, std::unique_ptr<UcxWorker> worker)
    : options_(options),
      callbacks_(std::move(callbacks)),
      inbox_(
          options.num_peers, callbacks_,
          [this](UcxInbox::Frame frame) { OnFrame(std::move(frame)); },
          [this](int32_t peer, const std::string& reason) { Break(peer, reason); }),
      worker_(std::move(worker)),
      address_(EncodeAddress(PeerProcess::OwnName(), worker_->address())),
      roll_(options.self, options.num_peers),
      peers_(options.num_peers),
      endpoints_(*worker_, options.num_peers,
                 [this](int32_t peer, const std::string& reason) { Break(peer, reason); }) {
  peers_[options.self].life = Life::kLost;
  inbox_.Listen(*worker_);
  thread_ = std::thread([this] { Run(); });
}

UcxWire::~UcxWire() { Close(); }

void UcxWire::Connect(std::vector<std::string> addresses) {
  const std::lock_guard lock(mutex_);
  if (closing_) return;
  addresses_ = std::move(addresses);
  worker_->Wake();
}

std::vector<Wire::Unreached> UcxWire::AwaitPeers(std::chrono::duration<double> patience) {
  std::vector<Unreached> unreached = roll_.Await(patience);
  const std::lock_guard lock(mutex_);
  given_up_ = unreached;
  worker_->Wake();
  return unreached;
}

void UcxWire::Send(int32_t peer, Header header, std::span<const std::byte> payload,
                   OnSent on_sent) {
  auto outgoing = std::make_unique<Outgoing>();
  *outgoing = {.wire = this, .peer = peer, .header = {}, .payload = payload, .on_sent = {}};
  const FramePrefix prefix{.kind = FrameKind::kMessage, .source = options_.self};
  outgoing->header.resize(sizeof(prefix) + header.size());
  std::memcpy(outgoing->header.data(), &prefix, sizeof(prefix));
  std::ranges::copy(header, outgoing->header.begin() + sizeof(prefix));
  {
    const std::lock_guard lock(mutex_);
    if (!closing_) {
      outgoing->on_sent = std::move(on_sent);
      queue_.push_back(std::move(outgoing));
      if (std::exchange(asleep_, false)) worker_->Wake();
      return;
    }
  }
  on_sent();
}

void UcxWire::Close() {
  std::call_once(closed_, [this] {
    {
      const std::lock_guard lock(mutex_);
      closing_ = true;
      worker_->Wake();
    }
    thread_.join();
  });
}

// Calls of the wire's thread.

void UcxWire::Run() {
  Clock::time_point last_busy = Clock::now();
  std::optional<Clock::time_point> deadline;
  while (true) {
    bool busy = TakeOrders();
    busy = worker_->Progress() || busy;
    LookAfterPeers();
    Settle();
    if (said_goodbye_) {
      if (!deadline) {
        deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                      duration<double>(options_.close_timeout_s));
      }
      if (IsFlushed() || Clock::now() > *deadline) break;
    }
    const Clock::time_point now = Clock::now();
    if (busy) last_busy = now;
    if (now - last_busy > kSpin) Sleep();
  }
  Shutdown();
}

// Carries out the orders of other threads. Returns whether there were any.
bool UcxWire::TakeOrders() {
  std::vector<std::unique_ptr<Outgoing>> queue;
  std::optional<std::vector<std::string>> addresses;
  std::vector<Unreached> given_up;
  bool closing = false;
  {
    const std::lock_guard lock(mutex_);
    addresses.swap(addresses_);
    given_up.swap(given_up_);
    closing = closing_;
    connected_ = connected_ || addresses;
    if (connected_ || closing) queue.swap(queue_);
  }
  if (addresses) OpenEndpoints(*addresses);
  for (const auto& [peer, reason] : given_up) Break(peer, reason);
  for (std::unique_ptr<Outgoing>& outgoing : queue) Post(std::move(outgoing));
  if (closing && !said_goodbye_) {
    said_goodbye_ = true;
    for (int32_t peer = 0; peer < options_.num_peers; ++peer) {
      if (peers_[peer].life == Life::kLive) PostSigned(FrameKind::kGoodbye, peer, [] {});
    }
  }
  return addresses || !queue.empty();
}

void UcxWire::Sleep() {
  {
    const std::lock_guard lock(mutex_);
    if (connected_ && !queue_.empty()) return;
    asleep_ = true;
  }
  worker_->Wait(said_goodbye_ ? kMaxSleepClosingMs : kMaxSleepMs);
  const std::lock_guard lock(mutex_);
  asleep_ = false;
}

void UcxWire::LookAfterPeers() {
  const auto ended = watch_.TakeEnded(Clock::now());
  if (ended.empty()) return;
  for (int i = 0; i < kMaxDrain && worker_->Progress(); ++i) {
  }
  for (const auto& [peer, reason] : ended) Break(peer, reason);
}

void UcxWire::OpenEndpoints(const std::vector<std::string>& addresses) {
  for (int32_t peer = 0; peer < options_.num_peers; ++peer) {
    if (peers_[peer].life == Life::kLost) continue;
    const auto [process, ucx_address] = DecodeAddress(addresses[peer]);
    watch_.Add(peer, process);
    endpoints_.Open(peer, ucx_address);
    PostSigned(FrameKind::kGreeting, peer, [] {});
    // The goodbye of the peer may have come before.
    if (peers_[peer].life == Life::kDeparted) AcknowledgeGoodbye(peer);
  }
}

void UcxWire::Post(std::unique_ptr<Outgoing> outgoing) {
  Peer& peer = peers_[outgoing->peer];
  FramePrefix prefix;
  std::memcpy(&prefix, outgoing->header.data(), sizeof(prefix));
  const bool wanted = peer.life == Life::kLive || prefix.kind == FrameKind::kGoodbyeAck;
  ucp_ep_h endpoint = endpoints_.to(outgoing->peer);
  if (!wanted || endpoint == nullptr) {
    outgoing->on_sent();
    return;
  }
  prefix.sequence = peer.next_sequence++;
  std::memcpy(outgoing->header.data(), &prefix, sizeof(prefix));
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.send = &UcxWire::OnSendDone;
  param.user_data = outgoing.get();
  const UcxLibrary& ucx = worker_->ucx();
  void* request = ucx.ucp_am_send_nbx(endpoint, 0, outgoing->header.data(), outgoing->header.size(),
                                      outgoing->payload.data(), outgoing->payload.size(), &param);
  if (UCS_PTR_IS_PTR(request)) {
    Outgoing* key = outgoing.get();
    posted_.emplace(key, std::move(outgoing));
    return;
  }
  if (request != nullptr) Break(outgoing->peer, ucx.ucs_status_string(UCS_PTR_STATUS(request)));
  outgoing->on_sent();
}

// Posts a frame of the wire itself.
void UcxWire::PostSigned(FrameKind kind, int32_t peer, OnSent on_sent) {
  auto outgoing = std::make_unique<Outgoing>();
  *outgoing = {.wire = this,
               .peer = peer,
               .header = std::vector<std::byte>(sizeof(FramePrefix)),
               .payload = {},
               .on_sent = std::move(on_sent)};
  const FramePrefix prefix{.kind = kind, .source = options_.self};
  std::memcpy(outgoing->header.data(), &prefix, sizeof(prefix));
  Post(std::move(outgoing));
}

void UcxWire::AcknowledgeGoodbye(int32_t peer) {
  PostSigned(FrameKind::kGoodbyeAck, peer, [this, peer] { Break(peer, kClosed); });
}

void UcxWire::OnSendDone(void* request, ucs_status_t status, void* outgoing) {
  auto* key = static_cast<Outgoing*>(outgoing);
  UcxWire& wire = *key->wire;
  const std::unique_ptr<Outgoing> done = std::move(wire.posted_.extract(key).mapped());
  const UcxLibrary& ucx = wire.worker_->ucx();
  ucx.ucp_request_free(request);
  if (status != UCS_OK) wire.Break(done->peer, ucx.ucs_status_string(status));
  done->on_sent();
}

void UcxWire::OnFrame(UcxInbox::Frame frame) {
  const int32_t source = frame.prefix.source;
  switch (frame.prefix.kind) {
    case FrameKind::kMessage:
      if (!frame.wanted) return;
      callbacks_.on_message(source, frame.header, std::move(frame.payload), frame.payload_bytes);
      return;
    case FrameKind::kGreeting:
      roll_.Hear(source);
      return;
    case FrameKind::kGoodbye:
      departing_.push_back(source);
      return;
    case FrameKind::kGoodbyeAck:
      peers_[source].acknowledged = true;
      return;
  }
}

// May be called from within UCX, where an endpoint must not be closed.
void UcxWire::Break(int32_t peer, const std::string& reason) { broken_.emplace_back(peer, reason); }

// Ends connections that peers have ended. A goodbye is handled first, because an error behind it is
// expected.
void UcxWire::Settle() {
  for (const int32_t peer : std::exchange(departing_, {})) {
    Report(peer, kClosed);
    peers_[peer].life = Life::kDeparted;
    if (endpoints_.to(peer) != nullptr) AcknowledgeGoodbye(peer);
  }
  for (const auto& [peer, reason] : std::exchange(broken_, {})) {
    Report(peer, reason);
    if (std::exchange(peers_[peer].life, Life::kLost) == Life::kLost) continue;
    inbox_.Drop(peer);
    endpoints_.Close(peer);
  }
}

void UcxWire::Report(int32_t peer, const std::string& reason) {
  if (peers_[peer].life != Life::kLive || said_goodbye_) return;
  roll_.Lose(peer, reason);
  callbacks_.on_lost(peer, reason);
}

bool UcxWire::IsFlushed() const {
  if (!posted_.empty()) return false;
  for (int32_t peer = 0; peer < options_.num_peers; ++peer) {
    const Peer& state = peers_[peer];
    const bool answered = state.life == Life::kLost || state.acknowledged;
    if (!answered && endpoints_.to(peer) != nullptr) return false;
  }
  return true;
}

void UcxWire::Shutdown() {
  for (int32_t peer = 0; peer < options_.num_peers; ++peer) {
    peers_[peer].life = Life::kLost;
    inbox_.Drop(peer);
    endpoints_.Close(peer);
  }
  const Clock::time_point deadline = Clock::now() + kCancel;
  while ((endpoints_.AnyClosing() || !posted_.empty()) && Clock::now() < deadline) {
    if (!worker_->Progress()) worker_->Wait(kMaxSleepClosingMs);
  }
  worker_->Close();  // OnSendDone may still be called
  for (const auto& [key, outgoing] : posted_) outgoing->on_sent();
  posted_.clear();
}

}  // namespace jax_sm_free
