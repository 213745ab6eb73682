// What the tests of Inboxes share: groups that exchange notes, and what arrives of them.

#ifndef JAX_SM_FREE_CC_CPU_INBOXES_TESTING_H_
#define JAX_SM_FREE_CC_CPU_INBOXES_TESTING_H_

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "cc/cpu/inboxes.h"
#include "cc/cpu/parcels.h"
#include "gtest/gtest.h"

namespace jax_sm_free::testing {

inline constexpr Op kRecv = Op::kDispatchRecv;
inline constexpr double kNever = 600;  // a timeout that no test waits for
inline constexpr double kSoon = 0.05;
inline constexpr double kLater = 0.4;  // leaves a busy machine the time to do something before

// What a message of these tests says in its one row.
struct Note {
  ExchangeKey key;
  int32_t src = 0;
  int32_t dst = 0;

  bool operator==(const Note&) const = default;
};

inline constexpr MessageHeader kHeader{
    .kind = static_cast<int32_t>(Kind::kCombine), .num_rows = 1, .row_bytes = sizeof(Note)};

inline Exchange ExchangeOf(const ExchangeKey& key) { return {.sequence = 1, .key = key}; }

inline Fault FaultWith(const char* seen) {
  return {.op = "test", .rank = 0, .expected = "", .seen = seen, .exchange = {}};
}

// Groups, and what their transport called back. Ranks are members: those of the first group come
// first.
class Group {
 public:
  explicit Group(int32_t ep_size, double timeout_s = kNever, int32_t num_groups = 1)
      : ep_size_(ep_size),
        config_{.ep_size = ep_size,
                .num_experts = ep_size,
                .row_bytes = sizeof(Note),
                .timeout_s = timeout_s},
        transport_(std::make_shared<Inboxes>(
            config_, std::vector<int32_t>(num_groups, ep_size),
            [this](int64_t run, const Fault&) { failed_runs_.push_back(run); })) {}

  Message MessageOf(const ExchangeKey& key, int32_t src, int32_t dst) {
    const Note note{key, src, dst};
    Message message(pool_.Take(), config_, kHeader);
    std::memcpy(message.row(0), &note, sizeof(note));
    return message;
  }

  std::optional<Fault> Send(const ExchangeKey& key, int32_t src, int32_t dst) {
    return transport_->Send(key, src, dst, MessageOf(key, src, dst));
  }

  // Everything that `src` has to send.
  std::optional<Fault> SendToAll(const ExchangeKey& key, int32_t src) {
    const int32_t first = src / ep_size_ * ep_size_;
    const Parcels parcels = ParcelsOfSend(config_, Hop::kDirect, src - first);
    const auto pack = [&](const Transport::Parcel& parcel) {
      return MessageOf(key, first + parcel.number, first + parcel.dst);
    };
    return transport_->SendAll(key, src, parcels, pack, true);
  }

  // The only send of `src` in an exchange.
  std::optional<Fault> SendOnly(const ExchangeKey& key, int32_t src, int32_t dst) {
    std::optional<Fault> fault = Send(key, src, dst);
    transport_->Finish(key, src);
    return fault;
  }

  // The only sends of every rank of the group but `missing`: to `dst`.
  void SendAll(const ExchangeKey& key, int32_t dst, const std::vector<int32_t>& missing = {}) {
    const int32_t first = dst / ep_size_ * ep_size_;
    for (int32_t src = first; src < first + ep_size_; ++src) {
      if (std::find(missing.begin(), missing.end(), src) != missing.end()) continue;
      EXPECT_FALSE(SendOnly(key, src, dst).has_value());
    }
  }

  std::future<Inboxes::Arrival> Receive(const ExchangeKey& key, int32_t dst) {
    auto promise = std::make_shared<std::promise<Inboxes::Arrival>>();
    transport_->Receive(kRecv, ExchangeOf(key), dst, [promise](Inboxes::Arrival arrival) {
      promise->set_value(std::move(arrival));
    });
    return promise->get_future();
  }

  Inboxes& transport() { return *transport_; }
  int64_t num_blocks() const { return pool_.num_blocks(); }
  const std::vector<int64_t>& failed_runs() const { return failed_runs_; }

 private:
  const int32_t ep_size_;
  const Config config_;
  BlockPool pool_{MaxMessageBytes(config_)};
  std::vector<int64_t> failed_runs_;
  std::shared_ptr<Inboxes> transport_;
};

// Whether the arrival holds what every rank sent to `dst`, by source: members from `first` on.
inline void ExpectNotes(const Inboxes::Arrival& arrival, const ExchangeKey& key, int32_t dst,
                        int32_t first = 0) {
  ASSERT_EQ(FaultOf(arrival), nullptr) << FaultOf(arrival)->Describe();
  const auto& messages = std::get<std::vector<Message>>(arrival);
  for (int32_t src = 0; src < static_cast<int32_t>(messages.size()); ++src) {
    Note note;
    std::memcpy(&note, messages[src].row(0), sizeof(note));
    EXPECT_EQ(note, (Note{key, first + src, dst}));
  }
}

inline std::string SeenBy(const Inboxes::Arrival& arrival) {
  return FaultOf(arrival) == nullptr ? "no fault" : FaultOf(arrival)->seen;
}

inline bool IsReady(const std::future<Inboxes::Arrival>& future) {
  return future.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
}

inline constexpr ExchangeKey kKey{.run = 1, .call_site = 2, .count = 3};
inline constexpr ExchangeKey kSameRun{.run = 1, .call_site = 2, .count = 4};
inline constexpr ExchangeKey kOtherRun{.run = 2, .call_site = 2, .count = 3};

}  // namespace jax_sm_free::testing

#endif  // JAX_SM_FREE_CC_CPU_INBOXES_TESTING_H_
