#include "cc/cpu/testing.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "cc/cpu/numeric.h"
#include "cc/cpu/pack.h"
#include "cc/layout.h"

namespace jax_sm_free::testing {
namespace {

template <typename T>
void EncodeAs(const std::vector<float>& values, std::byte* out) {
  for (size_t i = 0; i < values.size(); ++i) {
    const typename T::Storage stored = T::Store(values[i]);
    std::memcpy(out + i * sizeof(stored), &stored, sizeof(stored));
  }
}

template <typename T>
void DecodeAs(const std::byte* data, std::vector<float>& out) {
  for (size_t i = 0; i < out.size(); ++i) {
    typename T::Storage stored;
    std::memcpy(&stored, data + i * sizeof(stored), sizeof(stored));
    out[i] = T::Load(stored);
  }
}

bool LivesOn(const Config& config, int32_t expert, int32_t rank) {
  const int32_t first = rank * config.num_local_experts();
  return expert >= first && expert < first + config.num_local_experts();
}

int64_t Padded(int64_t rows, int64_t alignment) {
  while (rows % alignment != 0) ++rows;
  return rows;
}

// The rows for each local expert of `rank`, in the order of the contract.
std::vector<std::vector<ExpertRow>> RowsByExpert(const Config& config,
                                                 const std::vector<Source>& sources, int32_t rank) {
  std::vector<std::vector<ExpertRow>> groups(config.num_local_experts());
  for (size_t source = 0; source < sources.size(); ++source) {
    for (int64_t t = 0; t < sources[source].num_tokens; ++t) {
      for (int32_t k = 0; k < config.top_k; ++k) {
        const int32_t expert = sources[source].idx[t * config.top_k + k];
        if (!LivesOn(config, expert, rank)) continue;
        groups[expert - rank * config.num_local_experts()].push_back(
            {static_cast<int32_t>(source), t, k});
      }
    }
  }
  return groups;
}

int64_t LevelOf(const Config& config, const std::vector<std::vector<ExpertRow>>& groups) {
  if (config.expert_capacity > 0) return config.expert_capacity;
  int64_t highest = 0;
  for (const auto& group : groups) highest = std::max(highest, static_cast<int64_t>(group.size()));
  for (int64_t level = highest;; --level) {
    int64_t rows = 0;
    for (const auto& group : groups) {
      rows += Padded(std::min(level, static_cast<int64_t>(group.size())), config.expert_alignment);
    }
    if (rows <= config.recv_capacity) return level;
  }
}

}  // namespace

BlockPool PoisonedPool(const Config& config, int num_blocks, int poison) {
  BlockPool pool(MaxMessageBytes(config));
  std::vector<BlockPool::Block> blocks;
  for (int i = 0; i < num_blocks; ++i) {
    blocks.push_back(pool.Take());
    std::memset(blocks.back().get(), poison, MaxMessageBytes(config));
  }
  return pool;
}

std::vector<std::byte> RandomBytes(int64_t size, Random& random) {
  std::vector<std::byte> bytes(size);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random.Below(256));
  return bytes;
}

std::vector<std::byte> Encode(DType dtype, const std::vector<float>& values) {
  std::vector<std::byte> out(values.size() * ElementBytes(dtype));
  VisitDType(dtype, [&]<typename T>() { EncodeAs<T>(values, out.data()); });
  return out;
}

std::vector<float> Decode(DType dtype, const std::byte* data, int64_t size) {
  std::vector<float> out(size);
  VisitDType(dtype, [&]<typename T>() { DecodeAs<T>(data, out); });
  return out;
}

float Rounded(DType dtype, float value) {
  return Decode(dtype, Encode(dtype, {value}).data(), 1)[0];
}

Source RandomSource(const Config& config, int64_t num_tokens, int64_t values_bytes,
                    int64_t scales_bytes, Random& random) {
  Source source{.num_tokens = num_tokens,
                .values = RandomBytes(num_tokens * values_bytes, random),
                .scales = RandomBytes(num_tokens * scales_bytes, random),
                .values_bytes = values_bytes,
                .scales_bytes = scales_bytes};
  for (int64_t i = 0; i < num_tokens * config.top_k; ++i) {
    int32_t expert = random.Below(config.num_experts);
    if (random.Chance(0.1)) expert = -1;
    if (i % config.top_k != 0 && random.Chance(0.1)) expert = source.idx.back();
    source.idx.push_back(expert);
    source.weights.push_back(random.Normal());
  }
  return source;
}

std::vector<Source> RandomSources(const Config& config, int64_t values_bytes, int64_t scales_bytes,
                                  Random& random) {
  std::vector<Source> sources;
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    const int64_t num_tokens = random.Below(config.max_tokens + 1);
    sources.push_back(RandomSource(config, num_tokens, values_bytes, scales_bytes, random));
  }
  return sources;
}

std::vector<Message> DispatchMessages(const Config& config, const std::vector<Source>& sources,
                                      int32_t dst, BlockPool& pool) {
  std::vector<Message> messages;
  for (const Source& source : sources) {
    const auto route = std::get<Route>(Route::Make(config, source.topk()));
    messages.push_back(
        PackDispatch(config, route.tokens(dst), source.topk(), dst, source.rows(), pool.Take()));
  }
  return messages;
}

int32_t Placement::Find(int32_t source, int64_t token, int32_t k) const {
  for (size_t row = 0; row < rows.size(); ++row) {
    const std::optional<ExpertRow>& found = rows[row];
    if (found && found->source == source && found->token == token && found->k == k) {
      return static_cast<int32_t>(row);
    }
  }
  return -1;
}

Placement PlacementOf(const Config& config, const std::vector<Source>& sources, int32_t rank) {
  const auto groups = RowsByExpert(config, sources, rank);
  const int64_t level = LevelOf(config, groups);
  Placement placement;
  for (const auto& group : groups) {
    const auto count = static_cast<int64_t>(group.size());
    const int64_t kept = std::min(count, level);
    const int64_t size =
        config.expert_capacity > 0 ? config.expert_capacity : Padded(kept, config.expert_alignment);
    placement.counts.push_back(static_cast<int32_t>(count));
    placement.group_sizes.push_back(static_cast<int32_t>(size));
    placement.dropped += static_cast<int32_t>(count - kept);
    placement.rows.insert(placement.rows.end(), group.begin(), group.begin() + kept);
    placement.rows.resize(placement.rows.size() + size - kept);
  }
  placement.rows.resize(config.recv_capacity);
  return placement;
}

bool Visits(const Config& config, const Source& source, int64_t token, int32_t rank) {
  const auto first = source.idx.begin() + token * config.top_k;
  return std::any_of(first, first + config.top_k,
                     [&](int32_t expert) { return LivesOn(config, expert, rank); });
}

void OnEveryRank(int32_t num_ranks, const std::function<void(int32_t rank)>& body) {
  std::vector<std::thread> threads;
  threads.reserve(num_ranks);
  for (int32_t rank = 0; rank < num_ranks; ++rank) threads.emplace_back(body, rank);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace jax_sm_free::testing
