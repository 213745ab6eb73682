// What SMs have to do for a dispatch and a combine, phase by phase: all ranks of a group on one
// GPU, one after the other, with nothing beside them.
//
//     make CUDA=1 bench-kernels
//     bazel-bin/benchmarks/kernels [tokens a rank] [ranks] [nodes] [float8 | quantized]
//
// With "float8", the wire quantises the bfloat16 rows of a dispatch. With "quantized", the rows of
// a dispatch are float8 values with scales, which arrive as they were sent. Each time is from an
// event before the launches of a phase to one behind them, the median of all ranks and rounds. An
// empty kernel takes what the first row says. The floor of a phase is its bytes at the rate of a
// copy, which is measured in the same run.

#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "benchmarks/kernel_ranks.h"
#include "benchmarks/kernel_times.h"
#include "cc/config.h"
#include "cc/cuda/ops.h"
#include "cc/op.h"
#include "cc/operands.h"

namespace jax_sm_free::cuda {
namespace {

constexpr int kRounds = 12;
constexpr Matrix kMatrix{kDType, kHidden};

// The movers copy meanwhile, which the next phases are not to see.
void AwaitCopies() { std::this_thread::sleep_for(std::chrono::milliseconds(20)); }

RowFormat FormatOf(const Config& config) { return {config.wire_format, kMatrix}; }

// Runs an op of each rank, and takes the time of each of its phases.
template <typename Run>
void TimePhases(Table& table, Op op, const std::vector<Rank>& ranks, const Run& run) {
  const std::function<void(const char*)> on_phase = [&](const char* phase) {
    table.End(phase);
    table.Begin();
  };
  for (const Rank& rank : ranks) {
    table.Begin();
    run(DeviceCall{.op = op, .view = &rank.view(), .on_phase = &on_phase}, rank);
    AwaitCopies();
  }
}

void Dispatch(const std::vector<Rank>& ranks, Table& table) {
  const Config& config = ranks[0].buffer->config();
  const int64_t num_tokens = config.max_tokens;
  TimePhases(table, Op::kDispatchSend, ranks, [&](const DeviceCall& call, const Rank& rank) {
    DispatchSend(call,
                 {.position = rank.position,
                  .topk = {rank.topk_idx, rank.topk_weights, num_tokens},
                  .rows = rank.sent(),
                  .format = FormatOf(config)},
                 rank.token);
  });
  if (config.has_two_tiers()) {
    TimePhases(table, Op::kDispatchForward, ranks, [&](const DeviceCall& call, const Rank& rank) {
      DispatchForward(call, rank.token, {rank.token, rank.node_topk});
    });
  }
  TimePhases(table, Op::kDispatchRecv, ranks, [&](const DeviceCall& call, const Rank& rank) {
    DispatchRecv(call, rank.token, {rank.sent(), num_tokens},
                 {.rows = rank.received(),
                  .format = FormatOf(config),
                  .group_sizes = rank.group_sizes,
                  .counts = rank.counts,
                  .weights = rank.weights,
                  .dropped = rank.dropped,
                  .layout = {rank.layout_rows, rank.num_rows_from}});
  });
}

void Combine(const std::vector<Rank>& ranks, Table& table) {
  const Config& config = ranks[0].buffer->config();
  TimePhases(table, Op::kCombineSend, ranks, [&](const DeviceCall& call, const Rank& rank) {
    SendSums(call, {.matrix = kMatrix, .rows = rank.expert_rows()}, rank.token);
  });
  if (config.has_two_tiers()) {
    TimePhases(table, Op::kCombineForward, ranks, [&](const DeviceCall& call, const Rank& rank) {
      ForwardSums(call, rank.token, {rank.node_topk}, rank.token);
    });
  }
  TimePhases(table, Op::kCombineRecv, ranks, [&](const DeviceCall& call, const Rank& rank) {
    ReceiveSums(
        call, rank.token, rank.expert_rows(),
        {.matrix = kMatrix, .topk = {rank.topk_idx, nullptr, config.max_tokens}, .sums = rank.out});
  });
}

// The phases of a dispatch and of a combine, and the bytes that each of them moves.
using Phases = std::vector<std::pair<std::string, double>>;

Phases DispatchPhases(const Config& config, const Rows& rows, int64_t row_bytes) {
  const auto row = static_cast<double>(row_bytes);
  const RowFormat format = FormatOf(config);
  const auto wire = static_cast<double>(format.WireBytes(row_bytes));
  const double packed = rows.to_mates + rows.on_rails + (format.is_plain() ? 0 : rows.own_tokens);
  const double received = rows.to_mates + rows.to_other_nodes + rows.own_tokens;
  Phases phases = {{"route", 0}, {"pack", row * config.max_tokens + wire * packed}};
  if (config.has_two_tiers()) {
    const double forwarded = rows.on_rails + rows.to_other_nodes;
    phases.insert(phases.end(), {{"wait + route rail", 0}, {"forward rows", wire * forwarded}});
  }
  const auto capacity = static_cast<double>(config.recv_capacity);
  phases.insert(phases.end(), {{"wait", 0}, {"plan + unpack", wire * received + row * capacity}});
  return phases;
}

Phases CombinePhases(const Config& config, const Rows& rows) {
  const double row = kRowBytes;
  const double expert_rows = static_cast<double>(config.max_tokens) * kTopK;
  const double to_others = rows.to_mates + rows.to_other_nodes;
  if (!config.has_two_tiers()) {
    return {{"reduce-pack", row * (expert_rows - rows.own_expert_rows + to_others)},
            {"route + wait", 0},
            {"sum", row * (to_others + rows.own_expert_rows + config.max_tokens)}};
  }
  return {{"reduce-pack", row * (expert_rows + to_others + rows.own_tokens)},
          {"route rail + wait", 0},
          {"forward sums", row * (rows.to_other_nodes + rows.on_rails)},
          {"route + wait", 0},
          {"sum", row * (rows.to_mates + rows.own_tokens + rows.on_rails + config.max_tokens)}};
}

void TimeAll(const std::vector<Rank>& ranks, Table& times) {
  const Config& config = ranks[0].buffer->config();
  times.Time("nothing", [] {});
  times.Time("copy of x", [&] {
    (void)cudaMemcpyAsync(ranks[0].out, ranks[0].x, config.max_tokens * kRowBytes,
                          cudaMemcpyDeviceToDevice, nullptr);
  });
  times.Time("copy of rows", [&] {
    (void)cudaMemcpyAsync(ranks[0].rows, ranks[ranks.size() > 1 ? 1 : 0].rows,
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

constexpr const char* kKindTexts[] = {"", ", float8 wire", ", float8 rows with scales"};

void Run(const Setting& setting) {
  const Config config = MakeConfig(setting);
  const std::vector<Rank> ranks = MakeRanks(config, setting.kind == RowKind::kQuantized);
  Table warm_up;
  Table table;
  for (int round = -2; round < kRounds; ++round) TimeAll(ranks, round < 0 ? warm_up : table);
  cudaDeviceProp properties;
  MustSucceed(cudaGetDeviceProperties(&properties, 0));
  const double copied = 2.0 * static_cast<double>(config.recv_capacity) * kRowBytes;
  const double bytes_per_us = copied / (table.Median("copy of rows") - table.Median("nothing"));
  const Rows rows = CountRows(ranks);
  std::printf(
      "%s: %d ranks on %d nodes, %d tokens a rank, hidden %d, top-%d of %d, bfloat16%s; copies run "
      "at %.2f TB/s\n",
      properties.name, config.ep_size, config.num_nodes, config.max_tokens,
      static_cast<int>(kHidden), kTopK, kNumExperts, kKindTexts[static_cast<int>(setting.kind)],
      bytes_per_us / 1e6);
  const double x_bytes = static_cast<double>(config.max_tokens) * kRowBytes;
  table.PrintHead();
  table.Print({{"nothing", 0}, {"copy of x", 2.0 * x_bytes}, {"copy of rows", copied}},
              bytes_per_us);
  for (const auto& [op, phases] :
       {std::pair("dispatch", DispatchPhases(config, rows, ranks[0].sent().row_bytes())),
        std::pair("combine", CombinePhases(config, rows))}) {
    table.Print(phases, bytes_per_us);
    table.PrintSum(op, phases, bytes_per_us);
  }
}

}  // namespace
}  // namespace jax_sm_free::cuda

int main(int argc, char** argv) {
  jax_sm_free::cuda::Setting setting;
  if (argc > 1) setting.num_tokens = std::atoi(argv[1]);
  if (argc > 2) setting.ep_size = std::atoi(argv[2]);
  if (argc > 3) setting.num_nodes = std::atoi(argv[3]);
  const std::string kind = argc > 4 ? argv[4] : "";
  if (kind == "float8") setting.kind = jax_sm_free::cuda::RowKind::kFloat8;
  if (kind == "quantized") setting.kind = jax_sm_free::cuda::RowKind::kQuantized;
  if (setting.num_tokens < 1 || setting.ep_size < 1 || 256 % setting.ep_size != 0 ||
      setting.ep_size > 32 || setting.num_nodes < 1 || setting.ep_size % setting.num_nodes != 0 ||
      argc > 5 || (argc > 4 && setting.kind == jax_sm_free::cuda::RowKind::kPlain)) {
    std::fprintf(
        stderr,
        "kernels [tokens a rank] [ranks, up to 32, a power of two] [nodes, a power of two] "
        "[float8 | quantized]\n");
    return 2;
  }
  jax_sm_free::cuda::Run(setting);
  return 0;
}
