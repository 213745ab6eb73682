#include "cc/cpu/shared_wire.h"

#include <algorithm>
#include <cstring>
#include <span>
#include <utility>

namespace jax_sm_free {
namespace {

constexpr char kClosed[] = "it closed its end";

}  // namespace

class SharedWire::End : public Wire {
 public:
  End(std::shared_ptr<SharedWire> shared, int64_t number, Callbacks callbacks)
      : number_(number),
        callbacks_(std::move(callbacks)),
        address_(shared->wire_->address()),
        peers_(shared->lost_.size()),
        shared_(std::move(shared)) {}
  ~End() override { Close(); }

  const std::string& address() const override { return address_; }
  void Connect(std::vector<std::string> addresses) override {
    if (const auto shared = Shared()) shared->Connect(std::move(addresses));
  }
  std::vector<Unreached> AwaitPeers(std::chrono::duration<double> patience) override {
    const auto shared = Shared();
    return shared == nullptr ? std::vector<Unreached>() : shared->AwaitPeers(patience);
  }
  void Send(int32_t peer, Header header, std::span<const std::byte> payload,
            OnSent on_sent) override {
    const auto shared = Shared();
    if (shared == nullptr) return on_sent();
    shared->Send({.number = number_}, peer, header, payload, std::move(on_sent));
  }
  void Close() override {
    const std::lock_guard closing(close_);
    const auto shared = Shared();
    if (shared == nullptr) return;
    shared->Close(*this);
    const std::lock_guard lock(mutex_);
    shared_ = nullptr;
  }

 private:
  friend class SharedWire;
  struct Peer {
    bool departed = false;
    bool acknowledged = false;  // it has acknowledged our goodbye
  };

  // Null once this end has closed. So the shared wire ends with the last close, even if something
  // still holds an end.
  std::shared_ptr<SharedWire> Shared() const {
    const std::lock_guard lock(mutex_);
    return shared_;
  }

  const int64_t number_;
  const Callbacks callbacks_;
  const std::string address_;
  // The mutex of the shared wire guards these.
  std::vector<Peer> peers_;
  bool open_ = true;  // whether its callbacks may be called

  std::mutex close_;
  mutable std::mutex mutex_;
  std::shared_ptr<SharedWire> shared_;
};

Result<std::shared_ptr<SharedWire>> SharedWire::Open(int64_t id, int32_t self, int32_t num_peers,
                                                     const OpenWire& open_wire) {
  std::shared_ptr<SharedWire> shared(new SharedWire(id, self, num_peers));
  Result<std::unique_ptr<Wire>> wire = open_wire(shared->Callbacks());
  if (const Fault* fault = FaultOf(wire)) return *fault;
  shared->wire_ = std::move(std::get<0>(wire));
  return shared;
}

SharedWire::~SharedWire() {
  if (wire_ != nullptr) wire_->Close();
}

bool SharedWire::IsSound() const {
  const std::lock_guard lock(mutex_);
  return connected_ && std::ranges::none_of(lost_, [](const auto& why) { return why.has_value(); });
}

std::unique_ptr<Wire> SharedWire::Attach(int64_t number, Wire::Callbacks callbacks) {
  auto end = std::make_unique<End>(shared_from_this(), number, std::move(callbacks));
  const std::lock_guard lock(mutex_);
  ends_[number] = end.get();
  // A new end learns from AwaitPeers which peers are already lost.
  for (size_t peer = 0; peer < lost_.size(); ++peer) {
    end->peers_[peer].departed = lost_[peer].has_value();
  }
  return end;
}

void SharedWire::Connect(std::vector<std::string> addresses) {
  const std::lock_guard lock(mutex_);
  if (std::exchange(connected_, true)) return;
  wire_->Connect(std::move(addresses));
}

std::vector<Wire::Unreached> SharedWire::AwaitPeers(std::chrono::duration<double> patience) {
  std::vector<Wire::Unreached> unreached = wire_->AwaitPeers(patience);
  const std::lock_guard lock(mutex_);
  for (size_t i = 0; i < lost_.size(); ++i) {  // lost since it was heard
    const auto peer = static_cast<int32_t>(i);
    const auto is_peer = [peer](const Wire::Unreached& known) { return known.peer == peer; };
    if (lost_[i] && std::ranges::none_of(unreached, is_peer)) {
      unreached.push_back({peer, *lost_[i]});
    }
  }
  return unreached;
}

void SharedWire::Send(Label label, int32_t peer, Wire::Header header,
                      std::span<const std::byte> payload, Wire::OnSent on_sent) {
  std::vector<std::byte> labelled(sizeof(label) + header.size());
  std::memcpy(labelled.data(), &label, sizeof(label));
  std::ranges::copy(header, labelled.begin() + sizeof(label));
  wire_->Send(peer, labelled, payload, std::move(on_sent));
}

// A peer that has answered the goodbye has received everything that was sent before.
void SharedWire::Close(End& end) {
  std::unique_lock lock(mutex_);
  end.open_ = false;
  if (connected_) {
    for (int32_t peer = 0; peer < static_cast<int32_t>(lost_.size()); ++peer) {
      if (peer == self_ || lost_[peer] || end.peers_[peer].departed) continue;
      Send({.number = end.number_, .kind = Kind::kGoodbye}, peer, {}, {}, [] {});
    }
    changed_.wait_for(lock, kCloseTimeout, [this, &end] { return IsAnswered(end); });
  }
  ends_.erase(end.number_);
}

bool SharedWire::IsAnswered(const End& end) const {
  for (int32_t peer = 0; peer < static_cast<int32_t>(lost_.size()); ++peer) {
    const auto& [departed, acknowledged] = end.peers_[peer];
    if (peer != self_ && !lost_[peer] && !departed && !acknowledged) return false;
  }
  return true;
}

// Calls of the wire's thread.

Wire::Callbacks SharedWire::Callbacks() {
  return {
      .wants =
          [this](int32_t /*peer*/, Wire::Header header) {
            Label label;
            // A message without a label gets no place, and its sender is lost.
            if (header.size() < sizeof(label)) return true;
            std::memcpy(&label, header.data(), sizeof(label));
            const std::lock_guard lock(mutex_);
            return OpenEnd(label.number) != nullptr;
          },
      .allocate = [this](int32_t peer, Wire::Header header,
                         int64_t bytes) { return Allocate(peer, header, bytes); },
      .on_message = [this](int32_t peer, Wire::Header header, BlockPool::Block payload,
                           int64_t bytes) { OnMessage(peer, header, std::move(payload), bytes); },
      .on_lost = [this](int32_t peer, const std::string& reason) { OnLost(peer, reason); }};
}

SharedWire::End* SharedWire::OpenEnd(int64_t number) const {
  const auto found = ends_.find(number);
  return found == ends_.end() || !found->second->open_ ? nullptr : found->second;
}

BlockPool::Block SharedWire::Allocate(int32_t peer, Wire::Header header, int64_t bytes) const {
  Label label;
  if (header.size() < sizeof(label)) return nullptr;
  std::memcpy(&label, header.data(), sizeof(label));
  const std::lock_guard lock(mutex_);
  const End* end = OpenEnd(label.number);
  if (end == nullptr) return nullptr;
  return end->callbacks_.allocate(peer, header.subspan(sizeof(label)), bytes);
}

void SharedWire::OnMessage(int32_t peer, Wire::Header header, BlockPool::Block payload,
                           int64_t bytes) {
  Label label;
  if (header.size() < sizeof(label)) return;
  std::memcpy(&label, header.data(), sizeof(label));
  const std::lock_guard lock(mutex_);
  const auto found = ends_.find(label.number);
  switch (label.kind) {
    case Kind::kMessage:
      if (End* end = OpenEnd(label.number)) {
        end->callbacks_.on_message(peer, header.subspan(sizeof(label)), std::move(payload), bytes);
      }
      return;
    case Kind::kGoodbye:
      if (found != ends_.end()) Depart(*found->second, peer, kClosed);
      Send({.number = label.number, .kind = Kind::kGoodbyeAck}, peer, {}, {}, [] {});
      break;
    case Kind::kGoodbyeAck:
      if (found != ends_.end()) found->second->peers_[peer].acknowledged = true;
      break;
  }
  changed_.notify_all();
}

void SharedWire::OnLost(int32_t peer, const std::string& reason) {
  const std::lock_guard lock(mutex_);
  lost_[peer] = reason;
  for (const auto& [number, end] : ends_) Depart(*end, peer, reason);
  changed_.notify_all();
}

void SharedWire::Depart(End& end, int32_t peer, const std::string& reason) {
  if (std::exchange(end.peers_[peer].departed, true) || !end.open_) return;
  end.callbacks_.on_lost(peer, reason);
}

// ------------------------------------------------------------------- wires that others may share

SharedWires& SharedWires::Get() {
  static auto* wires = new SharedWires;  // never destroyed: wires may outlive static destructors
  return *wires;
}

void SharedWires::Add(const std::string& key, const std::shared_ptr<SharedWire>& wire) {
  const std::lock_guard lock(mutex_);
  std::erase_if(wires_, [](const auto& entry) { return entry.second.expired(); });
  wires_.emplace(key, wire);
}

std::shared_ptr<SharedWire> SharedWires::Find(const std::string& key) {
  std::shared_ptr<SharedWire> newest;
  std::vector<std::shared_ptr<SharedWire>>
      seen;  // the last reference to a wire must not end under the lock
  const std::lock_guard lock(mutex_);
  const auto [begin, end] = wires_.equal_range(key);
  for (auto entry = begin; entry != end; ++entry) {
    seen.push_back(entry->second.lock());
    const std::shared_ptr<SharedWire>& wire = seen.back();
    if (wire == nullptr || !wire->IsSound()) continue;
    if (newest == nullptr || wire->id() > newest->id()) newest = wire;
  }
  return newest;
}

}  // namespace jax_sm_free
