// What the tests of this directory share: data, an oracle of the contract, and ranks as threads.

#ifndef JAX_SM_FREE_CC_CPU_TESTING_H_
#define JAX_SM_FREE_CC_CPU_TESTING_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <optional>
#include <random>
#include <vector>

#include "cc/config.h"
#include "cc/cpu/block_pool.h"
#include "cc/cpu/message.h"
#include "cc/operands.h"

namespace jax_sm_free::testing {

// The same numbers in every run of a test.
class Random {
 public:
  explicit Random(uint64_t seed = 1) : engine_(seed) {}

  int32_t Below(int64_t n) { return static_cast<int32_t>(engine_() % static_cast<uint64_t>(n)); }
  bool Chance(double probability) { return Uniform() < probability; }
  float Normal() { return normal_(engine_); }

 private:
  double Uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }

  std::mt19937_64 engine_;
  std::normal_distribution<float> normal_;
};

// A vector of bytes with the value `poison`: an element that was not written shows. 0xFF makes NaNs
// and the integer -1. But -1 may also be a result, so there is a second value.
inline constexpr int kPoisons[] = {0xFF, 0x5A};
template <typename T>
std::vector<T> Poisoned(int64_t size, int poison = kPoisons[0]) {
  std::vector<T> values(size);
  if (size > 0) std::memset(values.data(), poison, size * sizeof(T));
  return values;
}

// A pool whose first `num_blocks` blocks hold poison.
BlockPool PoisonedPool(const Config& config, int num_blocks = 8, int poison = kPoisons[0]);

std::vector<std::byte> RandomBytes(int64_t size, Random& random);

// Converts elements to and from the form in which they are stored.
std::vector<std::byte> Encode(DType dtype, const std::vector<float>& values);
std::vector<float> Decode(DType dtype, const std::byte* data, int64_t size);
float Rounded(DType dtype, float value);  // as a row stores it

// The operands of one source rank. It owns its arrays.
struct Source {
  std::vector<int32_t> idx = {};    // [num_tokens, top_k]
  std::vector<float> weights = {};  // [num_tokens, top_k]
  int64_t num_tokens = 0;
  std::vector<std::byte> values = {};  // [num_tokens, values_bytes]
  std::vector<std::byte> scales = {};  // [num_tokens, scales_bytes]
  int64_t values_bytes = 0;
  int64_t scales_bytes = 0;

  TopK topk() const { return {idx.data(), weights.data(), num_tokens}; }
  ConstRows rows() const { return {values.data(), values_bytes, scales.data(), scales_bytes}; }
};

// A source with random rows and random experts. Some experts are -1, and some appear twice in a
// token.
Source RandomSource(const Config& config, int64_t num_tokens, int64_t values_bytes,
                    int64_t scales_bytes, Random& random);

// A source for each rank, with 0 to max_tokens tokens.
std::vector<Source> RandomSources(const Config& config, int64_t values_bytes, int64_t scales_bytes,
                                  Random& random);

// What `sources` send to `dst` in a dispatch.
std::vector<Message> DispatchMessages(const Config& config, const std::vector<Source>& sources,
                                      int32_t dst, BlockPool& pool);

// The rows that `rank` receives by the contract, found step by step.
struct ExpertRow {
  int32_t source = 0;
  int64_t token = 0;
  int32_t k = 0;
};
struct Placement {
  std::vector<std::optional<ExpertRow>> rows = {};  // [recv_capacity]; nullopt for padding
  std::vector<int32_t> group_sizes = {};            // [num_local_experts]
  std::vector<int32_t> counts = {};                 // [num_local_experts]
  int32_t dropped = 0;

  // The expert row of (source, token, k). -1 if it was dropped, or belongs to another rank.
  int32_t Find(int32_t source, int64_t token, int32_t k) const;
};
Placement PlacementOf(const Config& config, const std::vector<Source>& sources, int32_t rank);

// Whether any of the token's experts is on `rank`.
bool Visits(const Config& config, const Source& source, int64_t token, int32_t rank);

// Runs `body(rank)` on a thread for each rank, and waits for all of them.
void OnEveryRank(int32_t num_ranks, const std::function<void(int32_t rank)>& body);

}  // namespace jax_sm_free::testing

#endif  // JAX_SM_FREE_CC_CPU_TESTING_H_
