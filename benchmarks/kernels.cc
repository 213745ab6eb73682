// What SMs have to do for a dispatch and a combine, phase by phase: all ranks of a group on one
// GPU, one after the other, with nothing beside them.
//
//     make CUDA=1 bench-kernels
//     bazel-bin/benchmarks/kernels [tokens a rank] [ranks]
//
// Each time is from an event before the launches of a phase to one behind them, the median of all
// ranks and rounds. An empty kernel takes what the first row says. The floor of a phase is its
// bytes at the rate of a copy, which is measured in the same run.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "benchmarks/kernel_times.h"
#include "cc/config.h"
#include "cc/cuda/host/device_buffer.h"
#include "cc/cuda/ops.h"
#include "cc/op.h"
#include "cc/operands.h"
#include "cc/token.h"

namespace jax_sm_free::cuda {
namespace {

constexpr int64_t kHidden = 7168;
constexpr int32_t kNumExperts = 256;
constexpr int32_t kTopK = 8;
constexpr int64_t kRowBytes = kHidden * 2;
constexpr int kRounds = 12;

Config MakeConfig(int32_t ep_size, int32_t num_tokens) {
  Config config{.ep_size = ep_size,
                .num_experts = kNumExperts,
                .top_k = kTopK,
                .max_tokens = num_tokens,
                .num_slots = 1,
                .row_bytes = kRowBytes,
                .timeout_s = 20};
  config.recv_capacity = int64_t{num_tokens} * kTopK * 11 / 10;
  return config;
}

// Each token names different experts, all equally likely.
std::vector<int32_t> ChooseExperts(int32_t num_tokens, std::mt19937& random) {
  std::vector<int32_t> experts(kNumExperts);
  std::iota(experts.begin(), experts.end(), 0);
  std::vector<int32_t> chosen;
  for (int32_t token = 0; token < num_tokens; ++token) {
    for (int32_t k = 0; k < kTopK; ++k) {
      std::swap(experts[k], experts[k + random() % (kNumExperts - k)]);
      chosen.push_back(experts[k]);
    }
  }
  return chosen;
}

// One rank of the group: its buffer, and the arrays of its ops.
struct Rank {
  std::shared_ptr<DeviceBuffer> buffer;
  std::vector<int32_t> chosen;
  int32_t* topk_idx;
  float* topk_weights;
  int32_t* position;
  float* token = Take<float>(kTokenSize);
  std::byte* x;
  std::byte* out;
  std::byte* rows;
  float* weights;
  int32_t* group_sizes = Take<int32_t>(kNumExperts);
  int32_t* counts = Take<int32_t>(kNumExperts);
  int32_t* dropped = Take<int32_t>(1);
  int32_t* layout_rows;
  int32_t* num_rows_from;

  const RankView& view() const { return buffer->RankOf(0)->view; }
  ConstRows sent() const { return {x, kRowBytes, nullptr, 0}; }
  MutableRows received() const { return {rows, kRowBytes, nullptr, 0}; }
  ExpertRows expert_rows() const {
    return {rows, weights, {layout_rows, num_rows_from, kTopK, buffer->config().recv_capacity}};
  }
};

std::vector<Rank> MakeRanks(const Config& config) {
  Neighbours neighbours;
  neighbours.crossbar = std::make_shared<Crossbar>();
  neighbours.group_end =
      std::make_shared<GroupEnd>(std::make_shared<ClosedNote>(), std::make_shared<FaultNote>());
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    neighbours.regions.push_back(Take<std::byte>(RegionsOf(config).total));
  }
  std::mt19937 random(1);
  std::vector<Rank> ranks(config.ep_size);
  const int64_t num_tokens = config.max_tokens;
  for (int32_t i = 0; i < config.ep_size; ++i) {
    Rank& rank = ranks[i];
    auto made = DeviceBuffer::Make(i, config, {Place{0, i, i}}, neighbours);
    if (const Fault* fault = std::get_if<Fault>(&made)) {
      std::fprintf(stderr, "%s\n", fault->Describe().c_str());
      std::exit(1);
    }
    rank.buffer = std::get<std::shared_ptr<DeviceBuffer>>(std::move(made));
    rank.chosen = ChooseExperts(config.max_tokens, random);
    rank.topk_idx = Take<int32_t>(num_tokens * kTopK);
    MustSucceed(cudaMemcpy(rank.topk_idx, rank.chosen.data(), rank.chosen.size() * sizeof(int32_t),
                           cudaMemcpyHostToDevice));
    rank.topk_weights = Take<float>(num_tokens * kTopK);
    rank.position = Take<int32_t>(1);
    MustSucceed(cudaMemcpy(rank.position, &i, sizeof(i), cudaMemcpyHostToDevice));
    rank.x = Take<std::byte>(num_tokens * kRowBytes);
    rank.out = Take<std::byte>(num_tokens * kRowBytes);
    rank.rows = Take<std::byte>(config.recv_capacity * kRowBytes);
    rank.weights = Take<float>(config.recv_capacity);
    rank.layout_rows = Take<int32_t>(config.max_recv_tokens() * kTopK);
    rank.num_rows_from = Take<int32_t>(config.ep_size);
  }
  return ranks;
}

// The movers copy meanwhile, which the next phases are not to see.
void AwaitCopies() { std::this_thread::sleep_for(std::chrono::milliseconds(20)); }

// Runs an op of a rank, and takes the time of each of its phases.
template <typename Run>
void TimePhases(Table& table, Op op, const Rank& rank, const Run& run) {
  table.Begin();
  const std::function<void(const char*)> on_phase = [&](const char* phase) {
    table.End(phase);
    table.Begin();
  };
  run(DeviceCall{.op = op, .view = &rank.view(), .on_phase = &on_phase});
}

void Dispatch(const std::vector<Rank>& ranks, Table& table) {
  const int64_t num_tokens = ranks[0].buffer->config().max_tokens;
  for (const Rank& rank : ranks) {
    TimePhases(table, Op::kDispatchSend, rank, [&](const DeviceCall& call) {
      DispatchSend(call,
                   {.position = rank.position,
                    .topk = {rank.topk_idx, rank.topk_weights, num_tokens},
                    .rows = rank.sent()},
                   rank.token);
    });
    AwaitCopies();
  }
  for (const Rank& rank : ranks) {
    TimePhases(table, Op::kDispatchRecv, rank, [&](const DeviceCall& call) {
      DispatchRecv(call, rank.token, {rank.sent(), num_tokens},
                   {.rows = rank.received(),
                    .group_sizes = rank.group_sizes,
                    .counts = rank.counts,
                    .weights = rank.weights,
                    .dropped = rank.dropped,
                    .layout = {rank.layout_rows, rank.num_rows_from}});
    });
  }
}

void Combine(const std::vector<Rank>& ranks, Table& table) {
  const int64_t num_tokens = ranks[0].buffer->config().max_tokens;
  const Matrix matrix{DType::kBFloat16, kHidden};
  for (const Rank& rank : ranks) {
    TimePhases(table, Op::kCombineSend, rank, [&](const DeviceCall& call) {
      SendSums(call, {.matrix = matrix, .rows = rank.expert_rows()}, rank.token);
    });
    AwaitCopies();
  }
  for (const Rank& rank : ranks) {
    TimePhases(table, Op::kCombineRecv, rank, [&](const DeviceCall& call) {
      ReceiveSums(
          call, rank.token, rank.expert_rows(),
          {.matrix = matrix, .topk = {rank.topk_idx, nullptr, num_tokens}, .sums = rank.out});
    });
  }
}

// Rows of one rank, averages: of messages to others, of its own experts, and of its own tokens that
// have experts there.
struct Rows {
  double to_others = 0;
  double own_tokens = 0;
  double own_expert_rows = 0;
};
Rows CountRows(const std::vector<Rank>& ranks) {
  const Config& config = ranks[0].buffer->config();
  Rows rows;
  for (int32_t i = 0; i < config.ep_size; ++i) {
    for (int32_t token = 0; token < config.max_tokens; ++token) {
      uint32_t goes_to = 0;
      for (int32_t k = 0; k < kTopK; ++k) {
        const int32_t dst = ranks[i].chosen[token * kTopK + k] / config.num_local_experts();
        goes_to |= 1U << dst;
        if (dst == i) rows.own_expert_rows += 1.0 / config.ep_size;
      }
      const uint32_t own = goes_to >> i & 1U;
      rows.own_tokens += static_cast<double>(own) / config.ep_size;
      rows.to_others += static_cast<double>(__builtin_popcount(goes_to) - own) / config.ep_size;
    }
  }
  return rows;
}

void Run(int32_t ep_size, int32_t num_tokens) {
  const Config config = MakeConfig(ep_size, num_tokens);
  const std::vector<Rank> ranks = MakeRanks(config);
  Table warm_up;
  Table table;
  const int64_t x_bytes = num_tokens * kRowBytes;
  for (int round = -2; round < kRounds; ++round) {
    Table& times = round < 0 ? warm_up : table;
    times.Time("nothing", [] {});
    times.Time("copy of x", [&] {
      (void)cudaMemcpyAsync(ranks[0].out, ranks[0].x, x_bytes, cudaMemcpyDeviceToDevice, nullptr);
    });
    times.Time("copy of rows", [&] {
      (void)cudaMemcpyAsync(ranks[0].rows, ranks[1 % ep_size].rows,
                            config.recv_capacity * kRowBytes, cudaMemcpyDeviceToDevice, nullptr);
    });
    Dispatch(ranks, times);
    Combine(ranks, times);
    for (const Rank& rank : ranks) {
      if (const std::optional<std::string> fault = rank.buffer->SeenFault()) {
        std::fprintf(stderr, "%s\n", fault->c_str());
        std::exit(1);
      }
    }
  }
  cudaDeviceProp properties;
  MustSucceed(cudaGetDeviceProperties(&properties, 0));
  const double copied = 2.0 * static_cast<double>(config.recv_capacity) * kRowBytes;
  const double bytes_per_us = copied / (table.Median("copy of rows") - table.Median("nothing"));
  const Rows rows = CountRows(ranks);
  const double row = kRowBytes;
  const double expert_rows = static_cast<double>(num_tokens) * kTopK;
  std::printf(
      "%s: %d ranks, %d tokens a rank, hidden %d, top-%d of %d, bfloat16; copies run at %.2f "
      "TB/s\n",
      properties.name, ep_size, num_tokens, static_cast<int>(kHidden), kTopK, kNumExperts,
      bytes_per_us / 1e6);
  table.Print({{"nothing", 0},
               {"copy of x", 2.0 * static_cast<double>(x_bytes)},
               {"copy of rows", copied},
               {"route", 0},
               {"pack", row * (num_tokens + rows.to_others)},
               {"wait", 0},
               {"plan + unpack", row * (rows.to_others + rows.own_tokens +
                                        static_cast<double>(config.recv_capacity))},
               {"reduce-pack", row * (expert_rows - rows.own_expert_rows + rows.to_others)},
               {"route + wait", 0},
               {"sum", row * (rows.to_others + rows.own_expert_rows + num_tokens)}},
              bytes_per_us);
}

}  // namespace
}  // namespace jax_sm_free::cuda

int main(int argc, char** argv) {
  const int num_tokens = argc > 1 ? std::atoi(argv[1]) : 4096;
  const int ep_size = argc > 2 ? std::atoi(argv[2]) : 4;
  if (num_tokens < 1 || ep_size < 1 || 256 % ep_size != 0 || ep_size > 32) {
    std::fprintf(stderr, "kernels [tokens a rank] [ranks, up to 32, a power of two]\n");
    return 2;
  }
  jax_sm_free::cuda::Run(ep_size, num_tokens);
  return 0;
}
