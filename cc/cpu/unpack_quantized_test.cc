#include <cstddef>
#include <cstdint>
#include <vector>

#include "cc/cpu/testing.h"
#include "cc/cpu/unpack.h"
#include "cc/cpu/unpack_testing.h"
#include "cc/cpu/wire_rows.h"
#include "cc/wire_format.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using testing::Append;
using testing::DispatchMessages;
using testing::ExpectedTokens;
using testing::Experts;
using testing::kPoisons;
using testing::OutOf;
using testing::PoisonedExperts;
using testing::PoisonedPool;
using testing::PoisonedTokens;
using testing::Random;
using testing::RandomSources;
using testing::SmallConfig;
using testing::Source;
using testing::Tokens;
using testing::UnpackedExperts;

// 130 columns need two scales.
constexpr Matrix kMatrix{DType::kBFloat16, 130};
constexpr RowFormat kQuantized{WireFormat::kFloat8Block128, kMatrix};
constexpr int64_t kScalesBytes = kQuantized.WireBytes(kMatrix.row_bytes()) - kMatrix.hidden;

Config QuantizedConfig() {
  Config config = SmallConfig();
  config.row_bytes = kMatrix.row_bytes();
  config.recv_capacity = 50;
  config.expert_alignment = 4;
  return config;
}

// The rows after dequantising, for rows that arrived as pairs of values and scales.
std::vector<std::byte> Dequantized(const std::vector<std::byte>& values,
                                   const std::vector<std::byte>& scales) {
  const int64_t num_rows = static_cast<int64_t>(values.size()) / kMatrix.hidden;
  std::vector<std::byte> rows(num_rows * kMatrix.row_bytes());
  const MutableRows out{.values = rows.data(), .values_bytes = kMatrix.row_bytes()};
  for (int64_t row = 0; row < num_rows; ++row) {
    std::vector<std::byte> wire;
    Append(values, row, kMatrix.hidden, wire);
    Append(scales, row, kScalesBytes, wire);
    PutRow(kQuantized, wire.data(), out, row);
  }
  return rows;
}

// Pairs of random bytes, so that scales of all kinds appear.
std::vector<Source> QuantizedSources(const Config& config) {
  Random random(8);
  return RandomSources(config, kMatrix.hidden, kScalesBytes, random);
}

TEST(UnpackExpertsTest, DequantizesWhatArrivesAsPairs) {
  const Config config = QuantizedConfig();
  const std::vector<Source> sources = QuantizedSources(config);
  const Source like{.values_bytes = kMatrix.row_bytes()};
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    const Experts pairs = UnpackedExperts(config, sources, rank, kPoisons[0]);
    BlockPool pool = PoisonedPool(config);
    Experts seen = PoisonedExperts(config, like, kPoisons[0]);
    ExpertsOut out = OutOf(like, seen);
    out.format = kQuantized;
    const auto messages = DispatchMessages(config, sources, rank, pool);
    ASSERT_FALSE(UnpackExperts(config, messages, out).has_value());
    ASSERT_EQ(seen.values, Dequantized(pairs.values, pairs.scales));
    ASSERT_EQ(seen.rows, pairs.rows);
    ASSERT_EQ(seen.weights, pairs.weights);
  }
}

TEST(UnpackTokensTest, DequantizesWhatArrivesAsPairs) {
  const Config config = QuantizedConfig();
  const std::vector<Source> sources = QuantizedSources(config);
  const Source like{.values_bytes = kMatrix.row_bytes()};
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    const Tokens pairs = ExpectedTokens(config, sources, rank);
    BlockPool pool = PoisonedPool(config);
    Tokens seen = PoisonedTokens(config, like, kPoisons[0]);
    TokensOut out = OutOf(like, seen);
    out.format = kQuantized;
    const auto messages = DispatchMessages(config, sources, rank, pool);
    ASSERT_FALSE(UnpackTokens(config, messages, out).has_value());
    ASSERT_EQ(seen.values, Dequantized(pairs.values, pairs.scales));
    ASSERT_EQ(seen.rows, pairs.rows);
    ASSERT_EQ(seen.topk_idx, pairs.topk_idx);
  }
}

TEST(UnpackTokensTest, RowsThatWereNotQuantizedAreAFault) {
  const Config config = QuantizedConfig();
  Random random;
  const std::vector<Source> sources = RandomSources(config, kMatrix.row_bytes(), 0, random);
  BlockPool pool = PoisonedPool(config);
  Tokens tokens = PoisonedTokens(config, sources[0], 0);
  TokensOut out = OutOf(sources[0], tokens);
  out.format = kQuantized;
  EXPECT_TRUE(UnpackTokens(config, DispatchMessages(config, sources, 0, pool), out).has_value());
}

}  // namespace
}  // namespace jax_sm_free
