// A wire over UCX: shared memory within a host, and TCP or another network that UCX finds between
// hosts.

#ifndef JAX_SM_FREE_CC_CPU_UCX_WIRE_H_
#define JAX_SM_FREE_CC_CPU_UCX_WIRE_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cc/cpu/peer_process.h"
#include "cc/cpu/roll_call.h"
#include "cc/cpu/ucx_endpoints.h"
#include "cc/cpu/ucx_frame.h"
#include "cc/cpu/ucx_inbox.h"
#include "cc/cpu/ucx_worker.h"
#include "cc/cpu/wire.h"
#include "cc/fault.h"

namespace jax_sm_free {

// One thread makes all calls of UCX. Other threads queue sends for it. It sleeps while nothing
// happens.
//
// Each message is one active message of UCX. UCX copies small messages (eager), and lets the
// receiver fetch large messages into its own block (rendezvous). A peer has these states:
//
//   live --its goodbye--> departed --acknowledged, or error--> lost
//     |                                                          ^
//     +--------------------error of its endpoint-----------------+
//
// on_lost is called when a peer stops being live. UCX notices that a process of this host has died
// only when its parent has reaped it, so the wire itself watches these processes, too. To close, a
// wire says goodbye to every live peer, and waits until each has acknowledged it. A socket that is
// closed earlier may drop what the peer has not read yet.
class UcxWire : public Wire {
 public:
  struct Options {
    std::string library;  // path of libucp.so.0
    int32_t self = 0;
    int32_t num_peers = 1;  // processes, including this one
    // A host that has not answered for this long is lost. So is a process that has read no bytes
    // for this long while its connection is full.
    double link_timeout_s = 5.0;
    double close_timeout_s = 5.0;  // how long Close waits for peers
    // Further variables of UCX, as in UcxWorker::Options.
    std::vector<std::pair<std::string, std::string>> settings = {};
  };

  static Result<std::unique_ptr<UcxWire>> Open(const Options& options, Callbacks callbacks);
  ~UcxWire() override;

  const std::string& address() const override { return address_; }
  void Connect(std::vector<std::string> addresses) override;
  std::vector<Unreached> AwaitPeers(std::chrono::duration<double> patience) override;
  void Send(int32_t peer, Header header, std::span<const std::byte> payload,
            OnSent on_sent) override;
  void Close() override;

 private:
  using Clock = std::chrono::steady_clock;
  enum class Life { kLive, kDeparted, kLost };
  struct Peer {
    Life life = Life::kLive;
    uint64_t next_sequence = 0;
    bool acknowledged = false;  // it has acknowledged our goodbye
  };
  struct Outgoing {
    UcxWire* wire;
    int32_t peer;
    std::vector<std::byte> header;  // prefix and header
    std::span<const std::byte> payload;
    OnSent on_sent;
  };
  UcxWire(const Options& options, Callbacks callbacks, std::unique_ptr<UcxWorker> worker);

  void Run();
  bool TakeOrders();
  void Sleep();
  void LookAfterPeers();
  void OpenEndpoints(const std::vector<std::string>& addresses);
  void Post(std::unique_ptr<Outgoing> outgoing);
  void PostSigned(FrameKind kind, int32_t peer, OnSent on_sent);
  void AcknowledgeGoodbye(int32_t peer);
  void OnFrame(UcxInbox::Frame frame);
  void Break(int32_t peer, const std::string& reason);
  void Settle();
  void Report(int32_t peer, const std::string& reason);
  bool IsFlushed() const;
  void Shutdown();

  static void OnSendDone(void* request, ucs_status_t status, void* outgoing);

  const Options options_;
  const Callbacks callbacks_;
  UcxInbox inbox_;
  const std::unique_ptr<UcxWorker> worker_;
  const std::string address_;
  RollCall roll_;

  // Once the wire's thread runs, only that thread uses these.
  std::vector<Peer> peers_;
  UcxEndpoints endpoints_;
  std::unordered_map<Outgoing*, std::unique_ptr<Outgoing>> posted_;
  std::vector<int32_t> departing_;                       // peers that have said goodbye
  std::vector<std::pair<int32_t, std::string>> broken_;  // peers whose endpoint failed, and why
  bool connected_ = false;
  bool said_goodbye_ = false;
  PeerWatch watch_;

  std::mutex mutex_;
  std::vector<std::unique_ptr<Outgoing>> queue_;
  std::optional<std::vector<std::string>> addresses_;
  std::vector<Unreached> given_up_;
  bool closing_ = false;
  bool asleep_ = false;

  std::once_flag closed_;
  std::thread thread_;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_UCX_WIRE_H_
