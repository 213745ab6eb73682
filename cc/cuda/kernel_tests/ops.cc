#include "cc/cuda/kernel_tests/ops.h"

#include <cmath>
#include <utility>

#include "cc/token.h"

namespace jax_sm_free::cuda::kernel_tests {
namespace {

constexpr int32_t kUnset = -9;

Config MakeConfig(const Case& which) {
  Config config{.ep_size = which.ep_size,
                .num_experts = which.ep_size * kLocalExperts,
                .top_k = kTopK,
                .max_tokens = which.num_tokens + 1,
                .num_slots = 2,
                .row_bytes = which.hidden * int64_t{sizeof(float)},
                .timeout_s = which.timeout_s,
                .wire_format = which.wire_format,
                .num_nodes = which.num_nodes,
                .node_stride = which.node_stride,
                .dtype = which.dtype};
  // A token may name an expert twice.
  const int64_t named = config.max_recv_tokens() * config.top_k;
  config.recv_capacity = which.recv_capacity >= 0 ? which.recv_capacity : named;
  return config;
}

const std::byte* Bytes(const Floats& values) {
  return reinterpret_cast<const std::byte*>(values.data());
}
std::byte* Bytes(Floats& values) { return reinterpret_cast<std::byte*>(values.data()); }

ConstRows RowsOf(const Floats& values, int64_t row_bytes) {
  ConstRows rows;
  rows.values = Bytes(values);
  rows.values_bytes = row_bytes;
  return rows;
}
MutableRows RowsOf(Floats& values, int64_t row_bytes) {
  MutableRows rows;
  rows.values = Bytes(values);
  rows.values_bytes = row_bytes;
  return rows;
}

}  // namespace

Ops::Ops(const Case& which) : case_(which), config_(MakeConfig(which)), group_(config_) {
  for (int32_t rank = 0; rank < config_.ep_size; ++rank) arrays_.push_back(MakeArrays(rank));
}

Floats Ops::Numbers(int64_t count) {
  Floats numbers(count);
  for (float& number : numbers) number = static_cast<float>(static_cast<int>(random_() % 9) - 4);
  return numbers;
}

int32_t Ops::ExpertAnywhere() {
  return static_cast<int32_t>(random_() % (config_.num_experts + 1)) - 1;
}

int32_t Ops::ExpertFor(int32_t token, int32_t k) {
  const auto local = static_cast<int32_t>(random_() % kLocalExperts);
  switch (case_.routing) {
    case Routing::kAnywhere:
      return ExpertAnywhere();
    case Routing::kEverywhere:
      return k % config_.ep_size * kLocalExperts + local;
    case Routing::kNearlyEverywhere:
      return token % 7 == 3 ? ExpertAnywhere() : k % config_.ep_size * kLocalExperts + local;
    case Routing::kToFirstRank:
      return local;
    case Routing::kNowhere:
      return -1;
  }
  return -1;
}

Arrays Ops::MakeArrays(int32_t rank) {
  Arrays a;
  a.position = rank;
  a.token.resize(kTokenSize);
  a.x = Numbers(int64_t{case_.num_tokens} * case_.hidden);
  a.weights = Numbers(int64_t{case_.num_tokens} * kTopK);
  for (int32_t i = 0; i < case_.num_tokens * kTopK; ++i) {
    a.idx.push_back(ExpertFor(i / kTopK, i % kTopK));
  }
  a.rows.assign(config_.recv_capacity * case_.hidden, NAN);
  a.row_weights.assign(config_.recv_capacity, NAN);
  a.group_sizes.assign(kLocalExperts, kUnset);
  a.counts.assign(kLocalExperts, kUnset);
  a.layout_rows.assign(config_.max_recv_tokens() * kTopK, kUnset);
  a.num_rows_from.assign(config_.ep_size, kUnset);
  a.node_topk.assign(int64_t{config_.num_nodes} * config_.max_tokens * kTopK, kUnset);
  return a;
}

LayoutIn Ops::LayoutOf(int32_t rank) const {
  return {arrays_[rank].layout_rows.data(), arrays_[rank].num_rows_from.data(), kTopK,
          config_.recv_capacity};
}

void Ops::Move() { case_.held_up ? group_.HoldUp() : group_.Move(); }

DeviceCall Ops::CallOf(Op op, int32_t rank) const { return {.op = op, .view = &group_.view(rank)}; }

OwnRows Ops::OwnOf(int32_t rank) const {
  return {RowsOf(arrays_[rank].x, row_bytes()), format().is_plain() ? case_.num_tokens : 0};
}

void Ops::SendDispatch(int32_t rank) {
  Arrays& a = of(rank);
  DispatchSend(CallOf(Op::kDispatchSend, rank),
               {.position = &a.position,
                .topk = {a.idx.data(), a.weights.data(), case_.num_tokens},
                .rows = RowsOf(std::as_const(a.x), row_bytes()),
                .format = format()},
               a.token.data());
}

void Ops::ForwardDispatch(int32_t rank) {
  Arrays& a = of(rank);
  cuda::DispatchForward(CallOf(Op::kDispatchForward, rank), a.token.data(),
                        {.token = a.token.data(), .node_topk = a.node_topk.data()});
  AwaitKernels();
}

void Ops::ForwardAll(Op op) {
  if (!config_.has_two_tiers()) return;
  for (int32_t rank = 0; rank < config_.ep_size; ++rank) {
    Arrays& a = of(rank);
    const ForwardIn in{.node_topk = a.node_topk.data()};
    switch (op) {
      case Op::kDispatchForward:
        ForwardDispatch(rank);
        break;
      case Op::kCombineBackwardForward:
        CombineBackwardForward(CallOf(op, rank), a.token.data(), in, a.token.data());
        break;
      default:
        ForwardSums(CallOf(op, rank), a.token.data(), in, a.token.data());
    }
  }
  Move();
}

void Ops::RecvDispatch(int32_t rank) {
  Arrays& a = of(rank);
  DispatchRecv(CallOf(Op::kDispatchRecv, rank), a.token.data(), OwnOf(rank),
               {.rows = RowsOf(a.rows, row_bytes()),
                .format = format(),
                .group_sizes = a.group_sizes.data(),
                .counts = a.counts.data(),
                .weights = a.row_weights.data(),
                .dropped = &a.dropped,
                .layout = {a.layout_rows.data(), a.num_rows_from.data()}});
  AwaitKernels();
}

void Ops::Dispatch() {
  for (int32_t rank = 0; rank < config_.ep_size; ++rank) SendDispatch(rank);
  Move();
  ForwardAll(Op::kDispatchForward);
  for (int32_t rank = 0; rank < config_.ep_size; ++rank) RecvDispatch(rank);
}

void Ops::DispatchWithout(int32_t silent) {
  for (int32_t rank = 0; rank < config_.ep_size; ++rank) {
    if (rank != silent) SendDispatch(rank);
  }
  Move();
  for (int32_t rank = 0; rank < config_.ep_size && config_.has_two_tiers(); ++rank) {
    if (rank != silent) ForwardDispatch(rank);
  }
  Move();
  for (int32_t rank = 0; rank < config_.ep_size; ++rank) {
    if (rank != silent) RecvDispatch(rank);
  }
}

Array<TokenArrays> Ops::DispatchByTokens() {
  for (int32_t rank = 0; rank < config_.ep_size; ++rank) SendDispatch(rank);
  Move();
  ForwardAll(Op::kDispatchForward);
  Array<TokenArrays> results(config_.ep_size);
  const int64_t max_rows = config_.max_recv_tokens();
  for (int32_t rank = 0; rank < config_.ep_size; ++rank) {
    TokenArrays& a = results[rank];
    a.rows.assign(max_rows * case_.hidden, NAN);
    a.topk_idx.assign(max_rows * kTopK, kUnset);
    a.topk_weights.assign(max_rows * kTopK, NAN);
    a.counts.assign(kLocalExperts, kUnset);
    a.layout_rows.assign(max_rows, kUnset);
    a.num_rows_from.assign(config_.ep_size, kUnset);
    DispatchRecvTokens(CallOf(Op::kDispatchRecv, rank), of(rank).token.data(), OwnOf(rank),
                       {.rows = RowsOf(a.rows, row_bytes()),
                        .format = format(),
                        .topk_idx = a.topk_idx.data(),
                        .topk_weights = a.topk_weights.data(),
                        .counts = a.counts.data(),
                        .num_tokens = &a.num_tokens,
                        .layout = {a.layout_rows.data(), a.num_rows_from.data()}});
  }
  AwaitKernels();
  return results;
}

Floats Ops::SumsOf(Op op, int32_t rank, const std::optional<ExpertRows>& own, float* weight_grads) {
  Arrays& a = of(rank);
  Floats sums(a.x.size(), NAN);
  ReceiveSums(CallOf(op, rank), a.token.data(), own,
              {.matrix = matrix(),
               .topk = {a.idx.data(), nullptr, case_.num_tokens},
               .sums = Bytes(sums),
               .weight_grads = weight_grads});
  AwaitKernels();
  return sums;
}

std::vector<Floats> Ops::Combine(const std::vector<Floats>& y, bool weighted) {
  std::vector<ExpertRows> rows;
  for (int32_t rank = 0; rank < config_.ep_size; ++rank) {
    const float* weights = weighted ? of(rank).row_weights.data() : nullptr;
    rows.push_back({Bytes(y[rank]), weights, LayoutOf(rank)});
    SendSums(CallOf(Op::kCombineSend, rank), {.matrix = matrix(), .rows = rows.back()},
             of(rank).token.data());
  }
  Move();
  ForwardAll(Op::kCombineForward);
  std::vector<Floats> sums;
  sums.reserve(config_.ep_size);
  for (int32_t rank = 0; rank < config_.ep_size; ++rank) {
    sums.push_back(SumsOf(Op::kCombineRecv, rank, rows[rank], nullptr));
  }
  return sums;
}

std::vector<Floats> Ops::DispatchBackward(const std::vector<Floats>& y,
                                          const std::vector<Floats>& row_grads,
                                          std::vector<Floats>& weight_grads) {
  for (int32_t rank = 0; rank < config_.ep_size; ++rank) {
    SendSums(CallOf(Op::kDispatchBackwardSend, rank),
             {.matrix = matrix(),
              .rows = {.y = Bytes(y[rank]), .layout = LayoutOf(rank)},
              .weight_grads = row_grads[rank].data()},
             of(rank).token.data());
  }
  Move();
  ForwardAll(Op::kDispatchBackwardForward);
  std::vector<Floats> sums;
  for (int32_t rank = 0; rank < config_.ep_size; ++rank) {
    weight_grads.emplace_back(of(rank).weights.size(), NAN);
    sums.push_back(
        SumsOf(Op::kDispatchBackwardRecv, rank, std::nullopt, weight_grads.back().data()));
  }
  return sums;
}

std::vector<Floats> Ops::CombineBackward(const std::vector<Floats>& grads,
                                         const std::vector<Floats>& y,
                                         std::vector<Floats>& weight_grads) {
  for (int32_t rank = 0; rank < config_.ep_size; ++rank) {
    CombineBackwardSend(CallOf(Op::kCombineBackwardSend, rank),
                        {.topk = {of(rank).idx.data(), nullptr, case_.num_tokens},
                         .rows = RowsOf(grads[rank], row_bytes())},
                        of(rank).token.data());
  }
  Move();
  ForwardAll(Op::kCombineBackwardForward);
  std::vector<Floats> y_grads;
  for (int32_t rank = 0; rank < config_.ep_size; ++rank) {
    Arrays& a = of(rank);
    Floats& y_grad = y_grads.emplace_back(config_.recv_capacity * case_.hidden, NAN);
    Floats& weight_grad = weight_grads.emplace_back(config_.recv_capacity, NAN);
    CombineBackwardRecv(CallOf(Op::kCombineBackwardRecv, rank), a.token.data(),
                        {.matrix = matrix(),
                         .rows = {Bytes(y[rank]), a.row_weights.data(), LayoutOf(rank)},
                         .y_grad = Bytes(y_grad),
                         .weight_grads = weight_grad.data()});
  }
  AwaitKernels();
  return y_grads;
}

}  // namespace jax_sm_free::cuda::kernel_tests
