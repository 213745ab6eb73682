#include "cc/cpu/quantize.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cc/cpu/numeric.h"
#include "cc/cpu/testing.h"
#include "cc/quantized.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using testing::Decode;
using testing::Encode;
using testing::Poisoned;
using testing::Random;
using testing::Rounded;

// Row `i` as it travels: values, then scales.
std::vector<std::byte> WireRow(const ConstRows& rows, int64_t i) {
  std::vector<std::byte> wire(rows.row_bytes());
  std::memcpy(wire.data(), rows.values + i * rows.values_bytes, rows.values_bytes);
  std::memcpy(wire.data() + rows.values_bytes, rows.scales + i * rows.scales_bytes,
              rows.scales_bytes);
  return wire;
}

float ScaleOf(const std::vector<std::byte>& wire, int64_t hidden, int64_t group) {
  float scale = 0;
  std::memcpy(&scale, wire.data() + hidden + group * 4, 4);
  return scale;
}

struct Travelled {
  std::vector<std::byte> wire;
  std::vector<float> values;
};

// One row there and back. `values` are those of the dtype.
Travelled Travel(DType dtype, const std::vector<float>& row) {
  const Matrix matrix{dtype, static_cast<int64_t>(row.size())};
  const std::vector<std::byte> x = Encode(dtype, row);
  Travelled travelled{.wire = WireRow(QuantizedRows(matrix, x.data(), 1).rows(), 0), .values = {}};
  auto out = Poisoned<std::byte>(matrix.row_bytes());
  DequantizeRow(matrix, travelled.wire.data(), out.data());
  travelled.values = Decode(dtype, out.data(), matrix.hidden);
  return travelled;
}

TEST(QuantizedRowBytesTest, OneByteAColumnAndAScaleForEach128) {
  EXPECT_EQ(QuantizedRowBytes({DType::kBFloat16, 1}), 1 + 4);
  EXPECT_EQ(QuantizedRowBytes({DType::kBFloat16, 128}), 128 + 4);
  EXPECT_EQ(QuantizedRowBytes({DType::kFloat32, 129}), 129 + 8);
  EXPECT_EQ(QuantizedRowBytes({DType::kFloat16, 7168}), 7168 + 56 * 4);
}

TEST(QuantizeTest, EveryFiniteCodeArrivesAsItIsWhereTheScaleIsOne) {
  std::vector<float> row;
  for (int code = 0; code < 256; ++code) {
    if ((code & 0x7F) != kNanFloat8) row.push_back(Float8E4M3::Load(static_cast<uint8_t>(code)));
  }
  // Both groups get a 448, the largest.
  std::rotate(row.begin(), row.begin() + 64, row.end());
  const Travelled travelled = Travel(DType::kFloat32, row);
  EXPECT_EQ(ScaleOf(travelled.wire, 254, 0), 1.0F);
  EXPECT_EQ(ScaleOf(travelled.wire, 254, 1), 1.0F);
  for (size_t i = 0; i < row.size(); ++i) {
    EXPECT_EQ(std::bit_cast<uint32_t>(travelled.values[i]), std::bit_cast<uint32_t>(row[i]));
  }
}

// Random rows, of all magnitudes, against the formula written down column by column.
TEST(QuantizeTest, FollowsTheFormula) {
  Random random;
  for (const DType dtype : kDTypes) {
    for (const int64_t hidden : {1, 3, 127, 128, 129, 300, 512}) {
      std::vector<float> row;
      for (int64_t i = 0; i < hidden; ++i) {
        row.push_back(Rounded(dtype, random.Normal() * std::ldexp(1.0F, random.Below(28) - 14)));
      }
      const Travelled travelled = Travel(dtype, row);
      ASSERT_EQ(static_cast<int64_t>(travelled.wire.size()), QuantizedRowBytes({dtype, hidden}));
      for (int64_t i = 0; i < hidden; ++i) {
        const int64_t first = i / kScaleColumns * kScaleColumns;
        float amax = kMinAmax;
        for (int64_t j = first; j < std::min(first + kScaleColumns, hidden); ++j) {
          amax = std::max(amax, std::abs(row[j]));
        }
        const float scale = amax / kMaxFloat8;
        ASSERT_EQ(ScaleOf(travelled.wire, hidden, i / kScaleColumns), scale);
        const uint8_t code = Float8E4M3::Store(row[i] / scale);
        ASSERT_EQ(static_cast<uint8_t>(travelled.wire[i]), code);
        const float expected = Rounded(dtype, Float8E4M3::Load(code) * scale);
        ASSERT_EQ(std::bit_cast<uint32_t>(travelled.values[i]), std::bit_cast<uint32_t>(expected));
        // Half of the spacing of the largest, and what bfloat16 rounds off.
        ASSERT_LE(std::abs(travelled.values[i] - row[i]), amax / 16);
      }
    }
  }
}

TEST(QuantizeTest, EachRowHasScalesOfItsOwn) {
  const Matrix matrix{DType::kFloat32, 130};
  std::vector<float> x(390, 1.0F);
  std::fill(x.begin() + 130, x.begin() + 260, 448.0F);
  const auto bytes = Encode(matrix.dtype, x);
  const QuantizedRows quantized(matrix, bytes.data(), 3);
  for (const int64_t group : {0, 1}) {
    EXPECT_EQ(ScaleOf(WireRow(quantized.rows(), 0), 130, group), 1 / 448.0F);
    EXPECT_EQ(ScaleOf(WireRow(quantized.rows(), 1), 130, group), 1.0F);
    EXPECT_EQ(ScaleOf(WireRow(quantized.rows(), 2), 130, group), 1 / 448.0F);
  }
}

TEST(QuantizeTest, ZeroAndTinyRowsHaveTheLeastScale) {
  const Travelled travelled = Travel(DType::kFloat32, {0.0F, -0.0F, 1e-12F, -1e-40F});
  EXPECT_EQ(ScaleOf(travelled.wire, 4, 0), 1e-4F / 448.0F);
  for (const float value : travelled.values) EXPECT_EQ(value, 0.0F);
  EXPECT_FALSE(std::signbit(travelled.values[0]));
  EXPECT_TRUE(std::signbit(travelled.values[1]));
}

TEST(QuantizeTest, TheLargestNumbersStayFinite) {
  for (const DType dtype : kDTypes) {
    for (uint32_t below = 0; below < 64; ++below) {
      const auto top = std::bit_cast<uint32_t>(std::numeric_limits<float>::max());
      auto largest = std::bit_cast<float>(top - below);
      if (dtype == DType::kBFloat16) largest = std::bit_cast<float>(0x7F7F0000U - (below << 16));
      if (dtype == DType::kFloat16) largest = 65504.0F - 32.0F * static_cast<float>(below);
      const Travelled travelled = Travel(dtype, {largest, -largest});
      ASSERT_TRUE(std::isfinite(travelled.values[0])) << largest;
      ASSERT_NEAR(travelled.values[0] / largest, 1.0F, 1e-6F);
      ASSERT_EQ(travelled.values[1], -travelled.values[0]);
    }
  }
}

TEST(QuantizeTest, ANanOrAnInfinityMakesItsGroupNanAndNoOther) {
  for (const DType dtype : kDTypes) {
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
          -std::numeric_limits<float>::infinity()}) {
      std::vector<float> row(300, 1.0F);
      row[130] = bad;
      const Travelled travelled = Travel(dtype, row);
      const float nan = Rounded(dtype, std::bit_cast<float>(kNanScaleBits));
      for (int64_t i = 0; i < 300; ++i) {
        const float expected = i / kScaleColumns == 1 ? nan : 1.0F;
        ASSERT_EQ(std::bit_cast<uint32_t>(travelled.values[i]), std::bit_cast<uint32_t>(expected));
      }
    }
  }
}

}  // namespace
}  // namespace jax_sm_free
