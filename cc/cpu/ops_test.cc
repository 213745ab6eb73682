#include "cc/cpu/ops.h"

#include <algorithm>
#include <array>
#include <cfenv>
#include <chrono>
#include <cstddef>
#include <future>
#include <latch>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cc/cpu/testing.h"
#include "cc/cpu/unpack.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using testing::Decode;
using testing::Encode;
using ::testing::IsSubstring;
using testing::OnEveryRank;
using testing::Placement;
using testing::PlacementOf;
using testing::Poisoned;
using testing::Random;
using testing::RandomSource;
using testing::Rounded;
using testing::Source;
using testing::Visits;

using Token = std::array<float, kTokenSize>;

constexpr Matrix kMatrix{.dtype = DType::kBFloat16, .hidden = 6};

Config ConfigFor(int32_t ep_size) {
  return {.ep_size = ep_size,
          .num_experts = 2 * ep_size,
          .top_k = 3,
          .max_tokens = 10,
          .recv_capacity = 40,
          .num_slots = 2,
          .expert_alignment = 4,
          .row_bytes = kMatrix.row_bytes(),
          .timeout_s = 60};
}

// Device i is rank i.
std::shared_ptr<HostBuffer> BufferOf(const Config& config) {
  std::vector<std::optional<Place>> places;
  places.reserve(config.ep_size);
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    places.push_back(Place{.group = 0, .rank = rank, .position = rank});
  }
  return std::make_shared<HostBuffer>(0, config, std::move(places));
}

HostCall CallOf(Op op, const std::shared_ptr<HostBuffer>& buffer, int32_t rank, int64_t run) {
  return {op, buffer, buffer->RankOf(rank), run};
}

// Receive, waiting for it to be done.
std::optional<Fault> Received(const HostCall& call, const Token& token, Unpack unpack) {
  std::promise<std::optional<Fault>> promise;
  Receive(call, token.data(), std::move(unpack),
          [&promise](const std::optional<Fault>& fault) { promise.set_value(fault); });
  return promise.get_future().get();
}

std::string SeenBy(const std::optional<Fault>& fault) { return fault ? fault->seen : "no fault"; }

// The same sources on all ranks' threads: made from the number of the round.
std::vector<Source> SourcesOf(const Config& config, int64_t round) {
  Random random(round);
  std::vector<Source> sources;
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    Source source = RandomSource(config, random.Below(config.max_tokens + 1), 0, 0, random);
    std::vector<float> values(source.num_tokens * kMatrix.hidden);
    for (float& value : values) value = random.Normal();
    source.values = Encode(kMatrix.dtype, values);
    source.values_bytes = kMatrix.row_bytes();
    sources.push_back(std::move(source));
  }
  return sources;
}

// What an expert of these tests makes of a value.
float Expert(int32_t expert, float value) {
  return Rounded(kMatrix.dtype, value * static_cast<float>(1 + expert % 5));
}

// What the contract says that `rank` gets back for its tokens.
std::vector<std::byte> ExpectedSums(const Config& config, const std::vector<Source>& sources,
                                    int32_t rank) {
  std::vector<Placement> placements;
  placements.reserve(config.ep_size);
  for (int32_t r = 0; r < config.ep_size; ++r) {
    placements.push_back(PlacementOf(config, sources, r));
  }
  const Source& source = sources[rank];
  const auto x = Decode(kMatrix.dtype, source.values.data(), source.num_tokens * kMatrix.hidden);
  std::vector<float> sums(x.size(), 0.0F);
  for (size_t element = 0; element < x.size(); ++element) {
    const int64_t token = static_cast<int64_t>(element) / kMatrix.hidden;
    for (int32_t r = 0; r < config.ep_size; ++r) {
      float of_rank = 0;
      for (int32_t k = 0; k < config.top_k; ++k) {
        if (placements[r].Find(rank, token, k) < 0) continue;
        const int64_t entry = token * config.top_k + k;
        of_rank += source.weights[entry] * Expert(source.idx[entry], x[element]);
      }
      sums[element] += Rounded(kMatrix.dtype, of_rank);
    }
  }
  return Encode(kMatrix.dtype, sums);
}

// One rank's view of a layer: its results live as long as its exchanges.
class Layer {
 public:
  Layer(std::shared_ptr<HostBuffer> buffer, int32_t rank, int64_t run, int64_t site)
      : buffer_(std::move(buffer)),
        config_(buffer_->config()),
        rank_(rank),
        run_(run),
        site_(site),
        values_(Poisoned<std::byte>(config_.recv_capacity * kMatrix.row_bytes())),
        group_sizes_(Poisoned<int32_t>(config_.num_local_experts())),
        counts_(Poisoned<int32_t>(config_.num_local_experts())),
        weights_(Poisoned<float>(config_.recv_capacity)),
        dropped_(Poisoned<int32_t>(1)),
        rows_(Poisoned<int32_t>(config_.max_recv_tokens() * config_.top_k)),
        num_rows_from_(Poisoned<int32_t>(config_.ep_size)) {}

  std::optional<Fault> SendDispatch(const Source& source) {
    return DispatchSend(Call(Op::kDispatchSend), 2 * site_, rank_, source.topk(), source.rows(),
                        token_.data());
  }

  std::optional<Fault> ReceiveDispatch() {
    const ExpertsOut out{.rows = {.values = values_.data(), .values_bytes = kMatrix.row_bytes()},
                         .group_sizes = group_sizes_.data(),
                         .counts = counts_.data(),
                         .weights = weights_.data(),
                         .dropped = dropped_.data(),
                         .layout = {rows_.data(), num_rows_from_.data()}};
    return Received(Call(Op::kDispatchRecv), token_,
                    [out](const Config& config, const auto& messages) {
                      return UnpackExperts(config, messages, out);
                    });
  }

  std::optional<Fault> SendCombine() {
    const std::vector<std::byte> y = RunExperts();
    return SendSums(
        Call(Op::kCombineSend), 2 * site_ + 1,
        {.matrix = kMatrix,
         .y = y.data(),
         .weights = weights_.data(),
         .layout = {rows_.data(), num_rows_from_.data(), config_.top_k, config_.recv_capacity}},
        token_.data());
  }

  std::optional<Fault> ReceiveCombine(const Source& source, std::vector<std::byte>& out) {
    out = Poisoned<std::byte>(source.num_tokens * kMatrix.row_bytes());
    return Received(
        Call(Op::kCombineRecv), token_, [&](const Config& config, const auto& messages) {
          return SumOverRanks(config, kMatrix, source.topk(), messages, out.data(), nullptr);
        });
  }

 private:
  HostCall Call(Op op) const { return CallOf(op, buffer_, rank_, run_); }

  std::vector<std::byte> RunExperts() const {
    auto y = Decode(kMatrix.dtype, values_.data(), config_.recv_capacity * kMatrix.hidden);
    auto row = y.begin();
    for (int32_t e = 0; e < config_.num_local_experts(); ++e) {
      const auto end = row + group_sizes_[e] * kMatrix.hidden;
      const int32_t expert = rank_ * config_.num_local_experts() + e;
      std::transform(row, end, row, [=](float value) { return Expert(expert, value); });
      row = end;
    }
    return Encode(kMatrix.dtype, y);
  }

  const std::shared_ptr<HostBuffer> buffer_;
  const Config& config_;
  const int32_t rank_;
  const int64_t run_;
  const int64_t site_;
  Token token_{};
  std::vector<std::byte> values_;
  std::vector<int32_t> group_sizes_, counts_;
  std::vector<float> weights_;
  std::vector<int32_t> dropped_;
  std::vector<int32_t> rows_, num_rows_from_;
};

std::string Describe(const std::optional<Fault>& fault) { return fault ? fault->Describe() : ""; }

// Two layers at once, their ops interleaved in an order that differs from rank to rank and from
// round to round: only what depends on each other is in order.
void RunTwoLayers(const std::shared_ptr<HostBuffer>& buffer, int32_t rank, int64_t round) {
  const Config& config = buffer->config();
  Random random(1000 * round + rank);
  const std::array sources{SourcesOf(config, 2 * round), SourcesOf(config, 2 * round + 1)};
  const int64_t run = round / 8;  // a program may pass a call site many times
  std::array layers{Layer(buffer, rank, run, 0), Layer(buffer, rank, run, 1)};
  std::array<std::vector<std::byte>, 2> sums;
  std::array<int, 2> steps{};
  while (steps[0] < 4 || steps[1] < 4) {
    int which = random.Below(2);
    // A receive blocks here, so that it must not keep this rank from a send that others wait for.
    const bool blocks = steps[which] % 2 == 1;
    const bool behind = steps[1 - which] < steps[which];
    if (steps[which] == 4 || (blocks && behind)) which = 1 - which;
    const Source& source = sources[which][rank];
    std::optional<Fault> fault;
    switch (steps[which]++) {
      case 0:
        fault = layers[which].SendDispatch(source);
        break;
      case 1:
        fault = layers[which].ReceiveDispatch();
        break;
      case 2:
        fault = layers[which].SendCombine();
        break;
      default:
        fault = layers[which].ReceiveCombine(source, sums[which]);
    }
    ASSERT_EQ(Describe(fault), "");
  }
  for (int i = 0; i < 2; ++i) ASSERT_EQ(sums[i], ExpectedSums(config, sources[i], rank));
}

class RoundTest : public ::testing::TestWithParam<int32_t> {};

INSTANTIATE_TEST_SUITE_P(EpSize, RoundTest, ::testing::Values(1, 2, 4, 8));

TEST_P(RoundTest, TwoLayersInFlightManyTimes) {
  const auto buffer = BufferOf(ConfigFor(GetParam()));
  OnEveryRank(GetParam(), [&](int32_t rank) {
    for (int64_t round = 0; round < 100; ++round) {
      ASSERT_NO_FATAL_FAILURE(RunTwoLayers(buffer, rank, round)) << "round " << round;
    }
  });
  EXPECT_EQ(buffer->TakeFault(), std::nullopt);
}

TEST_P(RoundTest, MemoryIsThatOfTheExchangesInFlight) {
  const Config config = ConfigFor(GetParam());
  const auto buffer = BufferOf(config);
  OnEveryRank(GetParam(), [&](int32_t rank) {
    for (int64_t round = 0; round < 50; ++round) RunTwoLayers(buffer, rank, round);
  });
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    // Dispatches and combines; and other ranks may hold messages longer than their sender knows.
    EXPECT_LE(buffer->MessageBytes(rank),
              int64_t{2} * 2 * config.num_slots * config.ep_size * MaxMessageBytes(config));
  }
}

// ------------------------------------------------------------------------------------- backward

// The gradient that `rank` sends for the weight of (token, k).
float GradOf(int32_t rank, int64_t token, int32_t k) {
  return static_cast<float>(int64_t{1000} * rank + 10 * token + k);
}

// The token rows that `rank` received, as a layout of one row each, and a gradient for each weight.
struct TokenRows {
  std::vector<int32_t> rows, num_rows_from;
  std::vector<float> weight_grads;
};

TokenRows TokenRowsOf(const Config& config, const std::vector<Source>& sources, int32_t rank) {
  TokenRows made;
  for (const Source& source : sources) {
    made.num_rows_from.push_back(0);
    for (int64_t t = 0; t < source.num_tokens; ++t) {
      if (!Visits(config, source, t, rank)) continue;
      ++made.num_rows_from.back();
      made.rows.push_back(static_cast<int32_t>(made.rows.size()));
      for (int32_t k = 0; k < config.top_k; ++k) made.weight_grads.push_back(GradOf(rank, t, k));
    }
  }
  made.rows.resize(config.max_recv_tokens(), -1);
  made.weight_grads.resize(config.max_recv_tokens() * config.top_k);
  return made;
}

// Every rank sends ones back: a token's sum is the number of ranks it visited.
void ExpectGradients(const Config& config, const Source& source, const std::vector<float>& sums,
                     const std::vector<float>& weight_grads) {
  for (int64_t t = 0; t < source.num_tokens; ++t) {
    int ranks = 0;
    for (int32_t r = 0; r < config.ep_size; ++r) ranks += Visits(config, source, t, r) ? 1 : 0;
    EXPECT_EQ(sums[t * kMatrix.hidden], static_cast<float>(ranks));
    for (int32_t k = 0; k < config.top_k; ++k) {
      const int64_t entry = t * config.top_k + k;
      const int32_t expert = source.idx[entry];
      const int32_t owner = expert / config.num_local_experts();
      EXPECT_EQ(weight_grads[entry], expert < 0 ? 0.0F : GradOf(owner, t, k));
    }
  }
}

TEST(BackwardTest, DispatchBackwardBringsGradientsToTheirTokens) {
  const Config config = ConfigFor(4);
  const auto buffer = BufferOf(config);
  const std::vector<Source> sources = SourcesOf(config, 1);
  const std::vector<float> ones(config.max_recv_tokens() * kMatrix.hidden, 1.0F);
  const std::vector<std::byte> x_grad = Encode(kMatrix.dtype, ones);
  OnEveryRank(config.ep_size, [&](int32_t rank) {
    const Source& source = sources[rank];
    const TokenRows token_rows = TokenRowsOf(config, sources, rank);
    const SumOperands operands{.matrix = kMatrix,
                               .y = x_grad.data(),
                               .weight_grads = token_rows.weight_grads.data(),
                               .layout = {token_rows.rows.data(), token_rows.num_rows_from.data(),
                                          1, config.max_recv_tokens()}};
    Token token{};
    const HostCall send = CallOf(Op::kDispatchBackwardSend, buffer, rank, 1);
    ASSERT_EQ(Describe(SendSums(send, 0, operands, token.data())), "");

    auto out = Poisoned<std::byte>(source.num_tokens * kMatrix.row_bytes());
    auto weight_grads = Poisoned<float>(source.num_tokens * config.top_k);
    const auto unpack = [&](const Config& c, const std::vector<Message>& messages) {
      return SumOverRanks(c, kMatrix, source.topk(), messages, out.data(), weight_grads.data());
    };
    const HostCall recv = CallOf(Op::kDispatchBackwardRecv, buffer, rank, 1);
    ASSERT_EQ(Describe(Received(recv, token, unpack)), "");
    const auto sums = Decode(kMatrix.dtype, out.data(), source.num_tokens * kMatrix.hidden);
    ExpectGradients(config, source, sums, weight_grads);
  });
}

TEST(BackwardTest, CombineBackwardSendsATokensGradientToEveryRankOfItsExperts) {
  const Config config = ConfigFor(4);
  const auto buffer = BufferOf(config);
  const std::vector<Source> sources = SourcesOf(config, 2);
  OnEveryRank(config.ep_size, [&](int32_t rank) {
    Token token{};
    ASSERT_EQ(
        Describe(CombineBackwardSend(CallOf(Op::kCombineBackwardSend, buffer, rank, 1), 0,
                                     sources[rank].topk(), sources[rank].rows(), token.data())),
        "");
    const auto unpack = [&](const Config&, const std::vector<Message>& messages) {
      for (int32_t s = 0; s < config.ep_size; ++s) {
        int64_t row = 0;
        for (int64_t t = 0; t < sources[s].num_tokens; ++t) {
          if (!Visits(config, sources[s], t, rank)) continue;
          const std::byte* sent = sources[s].values.data() + t * kMatrix.row_bytes();
          EXPECT_TRUE(std::equal(sent, sent + kMatrix.row_bytes(), messages[s].row(row++)));
        }
        EXPECT_EQ(messages[s].header().num_rows, row);
      }
      return std::optional<Fault>();
    };
    EXPECT_EQ(Describe(Received(CallOf(Op::kCombineBackwardRecv, buffer, rank, 1), token, unpack)),
              "");
  });
}

// --------------------------------------------------------------------------------------- faults

class FaultsTest : public ::testing::Test {
 protected:
  static constexpr int32_t kEpSize = 4;

  // Sends and receives a dispatch on every rank, and gives what each saw.
  std::vector<std::string> Dispatch(const std::vector<Source>& sources, int64_t run) {
    std::vector<std::string> seen(kEpSize);
    OnEveryRank(kEpSize, [&](int32_t rank) {
      Layer layer(buffer_, rank, run, 0);
      std::optional<Fault> fault = layer.SendDispatch(sources[rank]);
      if (!fault) fault = layer.ReceiveDispatch();
      seen[rank] = SeenBy(fault);
    });
    return seen;
  }

  void ExpectThatARunWorks(int64_t run) {
    const std::vector<Source> sources = SourcesOf(config_, run);
    EXPECT_EQ(Dispatch(sources, run), std::vector<std::string>(kEpSize, "no fault"));
  }

  Config config_ = ConfigFor(kEpSize);
  std::shared_ptr<HostBuffer> buffer_ = BufferOf(config_);
};

TEST_F(FaultsTest, AnIndexOutOfRangeEndsAllRanksAndTheNextRunWorks) {
  for (int64_t run = 0; run < 20; run += 2) {
    std::vector<Source> sources = SourcesOf(config_, run);
    Random random(run);
    sources[1] = RandomSource(config_, 5, 0, 0, random);
    sources[1].values = std::vector<std::byte>(5 * kMatrix.row_bytes());
    sources[1].values_bytes = kMatrix.row_bytes();
    sources[1].idx[4] = config_.num_experts;
    EXPECT_EQ(Dispatch(sources, run), std::vector<std::string>(kEpSize, "8 at token 1, k 1"));
    const std::string kept = buffer_->TakeFault().value_or("");
    EXPECT_PRED_FORMAT2(IsSubstring, "dispatch_send on rank 1: expected topk_idx in [-1, 8)", kept);
    ExpectThatARunWorks(run + 1);
    EXPECT_EQ(buffer_->TakeFault(), std::nullopt);
  }
}

TEST_F(FaultsTest, ATokenUsedTwiceEndsTheRun) {
  const std::vector<Source> sources = SourcesOf(config_, 1);
  Layer layer(buffer_, 0, 1, 0);
  std::vector<std::unique_ptr<Layer>> others;
  for (int32_t rank = 1; rank < kEpSize; ++rank) {
    others.push_back(std::make_unique<Layer>(buffer_, rank, 1, 0));
    EXPECT_EQ(Describe(others.back()->SendDispatch(sources[rank])), "");
  }
  EXPECT_EQ(Describe(layer.SendDispatch(sources[0])), "");
  EXPECT_EQ(Describe(layer.ReceiveDispatch()), "");
  EXPECT_PRED_FORMAT2(IsSubstring, "received before", SeenBy(layer.ReceiveDispatch()));
  EXPECT_PRED_FORMAT2(IsSubstring, "received before", SeenBy(others[0]->ReceiveDispatch()));
  ExpectThatARunWorks(2);
}

TEST_F(FaultsTest, MoreSendsThanSlotsEndTheRun) {
  const std::vector<Source> sources = SourcesOf(config_, 1);
  Layer layer(buffer_, 0, 1, 0);
  for (int32_t i = 0; i < config_.num_slots; ++i) {
    EXPECT_EQ(Describe(layer.SendDispatch(sources[0])), "");
  }
  EXPECT_EQ(SeenBy(layer.SendDispatch(sources[0])), "one send more without a recv");
  ExpectThatARunWorks(2);
}

TEST_F(FaultsTest, RunsThatLostATokenGiveTheirMessagesBack) {
  const std::vector<Source> sources = SourcesOf(config_, 1);
  const auto lose_tokens = [&](int64_t first_run) {
    int64_t run = first_run;
    while (!Layer(buffer_, 0, run, 0).SendDispatch(sources[0])) ++run;
    return run;
  };
  const int64_t last_run = lose_tokens(0);
  const int64_t bytes = buffer_->MessageBytes(0);
  lose_tokens(last_run + 1);
  EXPECT_EQ(buffer_->MessageBytes(0), bytes);
}

TEST_F(FaultsTest, ADeviceAtAnotherPlaceOfTheMeshIsAFault) {
  const Source source = SourcesOf(config_, 1)[0];
  Token token{};
  const auto fault = DispatchSend(CallOf(Op::kDispatchSend, buffer_, 0, 1), 0, /*position=*/2,
                                  source.topk(), source.rows(), token.data());
  EXPECT_EQ(SeenBy(fault), "position 2");
}

TEST_F(FaultsTest, ALayoutOfOtherRowsIsAFault) {
  const std::vector<int32_t> rows(config_.max_recv_tokens(), 99);
  const std::vector<int32_t> num_rows_from(kEpSize, 1);
  Token token{};
  const auto fault = SendSums(
      CallOf(Op::kCombineSend, buffer_, 0, 1), 0,
      {.matrix = kMatrix, .layout = {rows.data(), num_rows_from.data(), 1, 99}}, token.data());
  EXPECT_EQ(SeenBy(fault), "99");
}

TEST_F(FaultsTest, ARankThatNeverSendsIsNamedByTheOthers) {
  config_.timeout_s = 0.1;
  buffer_ = BufferOf(config_);
  const std::vector<Source> sources = SourcesOf(config_, 1);
  std::latch all_sent(kEpSize - 1);
  OnEveryRank(kEpSize, [&](int32_t rank) {
    if (rank == 2) return;
    Layer layer(buffer_, rank, 1, 0);
    EXPECT_EQ(Describe(layer.SendDispatch(sources[rank])), "");
    all_sent.arrive_and_wait();  // lest the timeout be over for a slow thread
    EXPECT_PRED_FORMAT2(IsSubstring, "none from rank 2", SeenBy(layer.ReceiveDispatch()));
  });
  Layer late(buffer_, 2, 1, 0);
  EXPECT_PRED_FORMAT2(IsSubstring, "none from rank 2", SeenBy(late.SendDispatch(sources[2])));
}

TEST_F(FaultsTest, CloseEndsWhatWaits) {
  const std::vector<Source> sources = SourcesOf(config_, 1);
  Layer layer(buffer_, 0, 1, 0);
  EXPECT_EQ(Describe(layer.SendDispatch(sources[0])), "");
  std::thread closer([this] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    buffer_->Close();
  });
  EXPECT_EQ(SeenBy(layer.ReceiveDispatch()), "it was closed");
  closer.join();
}

TEST_F(FaultsTest, AFaultOfUnpackingEndsTheRun) {
  const std::vector<Source> sources = SourcesOf(config_, 1);
  Token token{};
  for (int32_t rank = 0; rank < kEpSize; ++rank) {
    EXPECT_EQ(Describe(DispatchSend(CallOf(Op::kDispatchSend, buffer_, rank, 1), 0, rank,
                                    sources[rank].topk(), sources[rank].rows(), token.data())),
              "");
  }
  const auto fault =
      Received(CallOf(Op::kDispatchRecv, buffer_, kEpSize - 1, 1), token,
               [](const Config&, const auto&) -> std::optional<Fault> {
                 return Fault{.peer = 1, .expected = "", .seen = "a mismatch", .exchange = {}};
               });
  ASSERT_TRUE(fault.has_value());
  EXPECT_EQ(fault->op, "dispatch_recv");
  EXPECT_EQ(fault->rank, kEpSize - 1);
  EXPECT_EQ(fault->peer, 1);
  Layer late(buffer_, 0, 1, 0);
  EXPECT_EQ(SeenBy(late.SendDispatch(sources[0])), "a mismatch");
}

TEST_F(FaultsTest, TheFloatModeOfTheReceiverHoldsWhereItsProgramGoesOn) {
  const std::vector<Source> sources = SourcesOf(config_, 1);
  Token token{};
  const HostCall call = CallOf(Op::kDispatchSend, buffer_, 0, 1);
  EXPECT_EQ(Describe(DispatchSend(call, 0, 0, sources[0].topk(), sources[0].rows(), token.data())),
            "");
  std::promise<int> rounding;
  ASSERT_EQ(std::fesetround(FE_UPWARD), 0);
  Receive(
      CallOf(Op::kDispatchRecv, buffer_, 0, 1), token.data(),
      [](const Config&, const auto&) { return std::optional<Fault>(); },
      [&rounding](const auto&) { rounding.set_value(std::fegetround()); });
  std::fesetround(FE_TONEAREST);
  for (int32_t rank = 1; rank < kEpSize; ++rank) {
    Layer other(buffer_, rank, 1, 0);
    EXPECT_EQ(Describe(other.SendDispatch(sources[rank])), "");
  }
  EXPECT_EQ(rounding.get_future().get(), FE_UPWARD);
}

}  // namespace
}  // namespace jax_sm_free
