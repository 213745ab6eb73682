// The ranks of a group on one GPU, with the arrays of their ops, for benchmarks of kernels.

#ifndef JAX_SM_FREE_BENCHMARKS_KERNEL_RANKS_H_
#define JAX_SM_FREE_BENCHMARKS_KERNEL_RANKS_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <utility>
#include <variant>
#include <vector>

#include "benchmarks/kernel_times.h"
#include "cc/config.h"
#include "cc/cuda/host/device_buffer.h"
#include "cc/operands.h"
#include "cc/tiers.h"
#include "cc/token.h"
#include "cc/wire_format.h"

namespace jax_sm_free::cuda {

inline constexpr int64_t kHidden = 7168;
inline constexpr int32_t kNumExperts = 256;
inline constexpr int32_t kTopK = 8;
inline constexpr int64_t kRowBytes = kHidden * 2;
inline constexpr int64_t kScaleBytes = ScalesBytes<Float8Block128>(kHidden);
inline constexpr DType kDType = DType::kBFloat16;

// The rows of a dispatch.
enum class RowKind {
  kPlain,     // bfloat16
  kFloat8,    // bfloat16 that the wire quantises
  kQuantized  // float8 values, and a float32 scale for each 128 of them
};

struct Setting {
  int32_t num_tokens = 4096;  // of a rank
  int32_t ep_size = 4;
  int32_t num_nodes = 1;
  RowKind kind = RowKind::kPlain;
};

inline Config MakeConfig(const Setting& setting) {
  Config config{.ep_size = setting.ep_size,
                .num_experts = kNumExperts,
                .top_k = kTopK,
                .max_tokens = setting.num_tokens,
                .num_slots = 1,
                .row_bytes = kRowBytes,
                .timeout_s = 20,
                .wire_format = setting.kind == RowKind::kFloat8 ? WireFormat::kFloat8Block128
                                                                : WireFormat::kPlain,
                .num_nodes = setting.num_nodes,
                .node_stride = setting.ep_size / setting.num_nodes,
                .dtype = kDType};
  config.recv_capacity = int64_t{setting.num_tokens} * kTopK * 11 / 10;
  return config;
}

// Each token names different experts, all equally likely.
inline std::vector<int32_t> ChooseExperts(int32_t num_tokens, std::mt19937& random) {
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
  bool has_scales;
  std::byte* x;
  std::byte* scales;
  std::byte* out;
  std::byte* rows;
  std::byte* row_scales;
  float* weights;
  int32_t* group_sizes = Take<int32_t>(kNumExperts);
  int32_t* counts = Take<int32_t>(kNumExperts);
  int32_t* dropped = Take<int32_t>(1);
  int32_t* layout_rows;
  int32_t* num_rows_from;
  int32_t* node_topk;

  const RankView& view() const { return buffer->RankOf(0)->view; }
  ConstRows sent() const {
    if (!has_scales) return {x, kRowBytes, nullptr, 0};
    return {x, kHidden, scales, kScaleBytes};
  }
  MutableRows received() const {
    if (!has_scales) return {rows, kRowBytes, nullptr, 0};
    return {rows, kHidden, row_scales, kScaleBytes};
  }
  ExpertRows expert_rows() const {
    return {rows, weights, {layout_rows, num_rows_from, kTopK, buffer->config().recv_capacity}};
  }
};

inline std::vector<Rank> MakeRanks(const Config& config, bool has_scales) {
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
  // Nobody reads the results of a combine, and memory is scarce: all ranks write to one place.
  auto* out = Take<std::byte>(num_tokens * kRowBytes);
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
    rank.has_scales = has_scales;
    rank.x = Take<std::byte>(num_tokens * kRowBytes);
    rank.scales = Take<std::byte>(num_tokens * kScaleBytes);
    rank.out = out;
    rank.rows = Take<std::byte>(config.recv_capacity * kRowBytes);
    rank.row_scales = Take<std::byte>(config.recv_capacity * kScaleBytes);
    rank.weights = Take<float>(config.recv_capacity);
    rank.layout_rows = Take<int32_t>(config.max_recv_tokens() * kTopK);
    rank.num_rows_from = Take<int32_t>(config.ep_size);
    rank.node_topk = Take<int32_t>(config.num_nodes * num_tokens * kTopK);
  }
  return ranks;
}

// Rows of one rank, averages: the tokens that have experts on the rank itself, on other ranks of
// its node, and on ranks of other nodes, once for each rank; those that have experts on another
// node, once for each node; and expert rows of the rank's own tokens on the rank itself.
struct Rows {
  double own_tokens = 0;
  double to_mates = 0;
  double to_other_nodes = 0;
  double on_rails = 0;
  double own_expert_rows = 0;
};
inline Rows CountRows(const std::vector<Rank>& ranks) {
  const Config& config = ranks[0].buffer->config();
  Rows rows;
  for (int32_t i = 0; i < config.ep_size; ++i) {
    for (int32_t token = 0; token < config.max_tokens; ++token) {
      std::set<int32_t> goes_to;
      std::set<int32_t> nodes;
      for (int32_t k = 0; k < kTopK; ++k) {
        const int32_t dst = ranks[i].chosen[token * kTopK + k] / config.num_local_experts();
        goes_to.insert(dst);
        if (NodeOf(config, dst) != NodeOf(config, i)) nodes.insert(NodeOf(config, dst));
        if (dst == i) rows.own_expert_rows += 1;
      }
      rows.on_rails += static_cast<double>(nodes.size());
      for (const int32_t dst : goes_to) {
        const bool is_mate = NodeOf(config, dst) == NodeOf(config, i);
        (dst == i ? rows.own_tokens : is_mate ? rows.to_mates : rows.to_other_nodes) += 1;
      }
    }
  }
  for (double* count : {&rows.own_tokens, &rows.to_mates, &rows.to_other_nodes, &rows.on_rails,
                        &rows.own_expert_rows}) {
    *count /= config.ep_size;
  }
  return rows;
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_BENCHMARKS_KERNEL_RANKS_H_
