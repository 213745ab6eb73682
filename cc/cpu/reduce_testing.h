// What the tests of reductions share: matrices, layouts and messages.

#ifndef JAX_SM_FREE_CC_CPU_REDUCE_TESTING_H_
#define JAX_SM_FREE_CC_CPU_REDUCE_TESTING_H_

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "cc/config.h"
#include "cc/cpu/block_pool.h"
#include "cc/cpu/message.h"
#include "cc/cpu/testing.h"
#include "cc/operands.h"
#include "gtest/gtest.h"

namespace jax_sm_free::testing {

inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

Config ConfigFor(const Matrix& matrix);

std::vector<float> Normals(int64_t size, Random& random);

// A matrix's elements, as they are stored.
struct Elements {
  Elements(const Matrix& matrix, const std::vector<float>& values)
      : hidden(matrix.hidden),
        stored(Encode(matrix.dtype, values)),
        loaded(Decode(matrix.dtype, stored.data(), static_cast<int64_t>(values.size()))) {}

  float at(int64_t row, int64_t column) const { return loaded[row * hidden + column]; }

  int64_t hidden;
  std::vector<std::byte> stored;
  std::vector<float> loaded;
};

// Compares bits: zeros of different signs differ, and NaNs are equal.
void ExpectBits(const Matrix& matrix, const std::byte* seen, const std::vector<float>& expected);

// A layout that owns its arrays. Each of `rows` is -1 or differs from all others.
struct OwnedLayout {
  std::vector<int32_t> rows;           // [R, fanout]
  std::vector<int32_t> num_rows_from;  // [ep_size]
  int32_t fanout = 1;
  int64_t num_rows = 0;

  LayoutIn in() const { return {rows.data(), num_rows_from.data(), fanout, num_rows}; }
  int64_t num_token_rows() const;
};

OwnedLayout RandomLayout(const Config& config, int32_t fanout, Random& random);

// A message with these rows, as PackSums sends it to a rank.
Message MessageOf(const Config& config, Kind kind, const Matrix& matrix,
                  const std::vector<float>& values, BlockPool& pool);

// Instantiate it with AllMatrices() and NameOfMatrix.
class ReduceTest : public ::testing::TestWithParam<std::tuple<DType, int>> {
 protected:
  Matrix matrix_{.dtype = std::get<0>(GetParam()), .hidden = std::get<1>(GetParam())};
  Config config_ = ConfigFor(matrix_);
  Random random_;
  BlockPool pool_ = PoisonedPool(config_);
};

inline auto AllMatrices() {
  return ::testing::Combine(::testing::ValuesIn(kDTypes), ::testing::Values(1, 7, 511, 513));
}

std::string NameOfMatrix(const ::testing::TestParamInfo<std::tuple<DType, int>>& info);

}  // namespace jax_sm_free::testing

#endif  // JAX_SM_FREE_CC_CPU_REDUCE_TESTING_H_
