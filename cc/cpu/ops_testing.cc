#include "cc/cpu/ops_testing.h"

#include <algorithm>
#include <future>
#include <utility>

namespace jax_sm_free::testing {

Config ConfigFor(int32_t ep_size) {
  return {.ep_size = ep_size,
          .num_experts = 2 * ep_size,
          .top_k = 3,
          .max_tokens = 10,
          .recv_capacity = 40,
          .num_slots = 2,
          .expert_alignment = 4,
          .row_bytes = kMatrix.row_bytes(),
          .timeout_s = 60,
          .dtype = kMatrix.dtype};
}

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

std::optional<Fault> Awaited(HostCall call, const std::function<void(const HostCall&)>& recv) {
  std::promise<std::optional<Fault>> promise;
  call.done = [&promise](const std::optional<Fault>& fault) { promise.set_value(fault); };
  recv(call);
  return promise.get_future().get();
}

std::optional<Fault> Received(const HostCall& call, const Token& token, Unpack unpack) {
  return Awaited(
      call, [&](const HostCall& awaited) { Receive(awaited, token.data(), std::move(unpack)); });
}

std::string Describe(const std::optional<Fault>& fault) { return fault ? fault->Describe() : ""; }

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

float Expert(int32_t expert, float value) {
  return Rounded(kMatrix.dtype, value * static_cast<float>(1 + expert % 5));
}

Layer::Layer(std::shared_ptr<HostBuffer> buffer, int32_t rank, int64_t run, int64_t site)
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
      num_rows_from_(Poisoned<int32_t>(config_.ep_size)),
      node_topk_(Poisoned<int32_t>(int64_t{config_.num_nodes} * config_.max_tokens * config_.top_k,
                                   kPoisons[1])) {}

std::optional<Fault> Layer::SendDispatch(const Source& source) {
  HostCall call = Call(Op::kDispatchSend);
  call.call_site = 2 * site_;
  return DispatchSend(call, {&rank_, source.topk(), source.rows()}, token_.data());
}

std::optional<Fault> Layer::ForwardDispatch() {
  return Awaited(Call(Op::kDispatchForward), [&](const HostCall& call) {
    DispatchForward(call, token_.data(), {.token = token_.data(), .node_topk = node_topk_.data()});
  });
}

std::optional<Fault> Layer::ReceiveDispatch() {
  const ExpertsOut out{.rows = {.values = values_.data(), .values_bytes = kMatrix.row_bytes()},
                       .group_sizes = group_sizes_.data(),
                       .counts = counts_.data(),
                       .weights = weights_.data(),
                       .dropped = dropped_.data(),
                       .layout = {rows_.data(), num_rows_from_.data()}};
  return Awaited(Call(Op::kDispatchRecv),
                 [&](const HostCall& call) { DispatchRecv(call, token_.data(), {}, out); });
}

std::optional<Fault> Layer::SendCombine() {
  const std::vector<std::byte> y = RunExperts();
  HostCall call = Call(Op::kCombineSend);
  call.call_site = 2 * site_ + 1;
  return SendSums(call, {kMatrix, {y.data(), weights_.data(), layout()}}, token_.data());
}

std::optional<Fault> Layer::ForwardCombine() {
  return Awaited(Call(Op::kCombineForward), [&](const HostCall& call) {
    ForwardSums(call, token_.data(), {node_topk_.data()}, token_.data());
  });
}

std::optional<Fault> Layer::ReceiveCombine(const Source& source, std::vector<std::byte>& out) {
  out = Poisoned<std::byte>(source.num_tokens * kMatrix.row_bytes());
  const SumsOut sums{.matrix = kMatrix, .topk = source.topk(), .sums = out.data()};
  return Awaited(Call(Op::kCombineRecv), [&](const HostCall& call) {
    ReceiveSums(call, token_.data(), std::nullopt, sums);
  });
}

std::vector<std::byte> Layer::RunExperts() const {
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

}  // namespace jax_sm_free::testing
