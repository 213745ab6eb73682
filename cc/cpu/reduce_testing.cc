#include "cc/cpu/reduce_testing.h"

#include <bit>
#include <cstring>
#include <utility>

namespace jax_sm_free::testing {

Config ConfigFor(const Matrix& matrix) {
  return {.ep_size = 4,
          .num_experts = 8,
          .top_k = 3,
          .max_tokens = 12,
          .recv_capacity = 100,
          .row_bytes = matrix.row_bytes()};
}

std::vector<float> Normals(int64_t size, Random& random) {
  std::vector<float> values(size);
  for (float& value : values) value = random.Normal();
  return values;
}

void ExpectBits(const Matrix& matrix, const std::byte* seen, const std::vector<float>& expected) {
  const std::vector<std::byte> stored = Encode(matrix.dtype, expected);
  if (std::memcmp(seen, stored.data(), stored.size()) == 0) return;
  const auto values = Decode(matrix.dtype, seen, static_cast<int64_t>(expected.size()));
  for (size_t i = 0; i < expected.size(); ++i) {
    ASSERT_EQ(std::bit_cast<uint32_t>(values[i]),
              std::bit_cast<uint32_t>(Rounded(matrix.dtype, expected[i])))
        << "element " << i << ": " << values[i] << ", not " << expected[i];
  }
}

int64_t OwnedLayout::num_token_rows() const {
  int64_t sum = 0;
  for (const int32_t rows_from : num_rows_from) sum += rows_from;
  return sum;
}

OwnedLayout RandomLayout(const Config& config, int32_t fanout, Random& random) {
  OwnedLayout layout{
      .rows = Poisoned<int32_t>(config.max_recv_tokens() * fanout, 0x5A),  // not read past the end
      .num_rows_from = {},
      .fanout = fanout,
      .num_rows = config.max_recv_tokens() * fanout};
  for (int32_t rank = 0; rank < config.ep_size; ++rank) {
    layout.num_rows_from.push_back(random.Below(config.max_tokens + 1));
  }
  std::vector<int32_t> shuffled(layout.num_rows);
  for (int32_t row = 0; row < layout.num_rows; ++row) shuffled[row] = row;
  for (int64_t i = 0; i < layout.num_rows; ++i) {
    std::swap(shuffled[i], shuffled[random.Below(layout.num_rows)]);
  }
  for (int64_t i = 0; i < layout.num_token_rows() * fanout; ++i) {
    layout.rows[i] = random.Chance(0.3) ? -1 : shuffled[i];
  }
  return layout;
}

Message MessageOf(const Config& config, Kind kind, const Matrix& matrix,
                  const std::vector<float>& values, BlockPool& pool) {
  const auto num_rows = static_cast<int32_t>(values.size() / matrix.hidden);
  Message message(
      pool.Take(), config,
      {.kind = static_cast<int32_t>(kind), .num_rows = num_rows, .row_bytes = matrix.row_bytes()});
  const std::vector<std::byte> stored = Encode(matrix.dtype, values);
  for (int32_t i = 0; i < num_rows; ++i) {
    std::memcpy(message.row(i), stored.data() + i * matrix.row_bytes(), matrix.row_bytes());
  }
  return message;
}

std::string NameOfMatrix(const ::testing::TestParamInfo<std::tuple<DType, int>>& info) {
  constexpr const char* kNames[] = {"Float32", "BFloat16", "Float16"};
  const auto& [dtype, hidden] = info.param;
  return std::string(kNames[static_cast<int>(dtype)]) + "x" + std::to_string(hidden);
}

}  // namespace jax_sm_free::testing
