#include "cc/cpu/wire_rows.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cc/cpu/numeric.h"
#include "cc/cpu/testing.h"
#include "cc/wire_format.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using testing::Decode;
using testing::Encode;
using testing::Poisoned;
using testing::Random;
using testing::Rounded;

RowFormat Float8Of(DType dtype, int64_t hidden) {
  return {WireFormat::kFloat8Block128, {dtype, hidden}};
}

// `num_rows` rows of `x` as they travel, one after the other: the values and then the scales of
// each.
std::vector<std::byte> Travelling(const RowFormat& format, const std::vector<std::byte>& x,
                                  int64_t num_rows) {
  const ConstRows given{.values = x.data(), .values_bytes = format.matrix.row_bytes()};
  const WireRows travelling(format, given, num_rows);
  const ConstRows& rows = travelling.rows();
  std::vector<std::byte> wire;
  for (int64_t i = 0; i < num_rows; ++i) {
    const std::byte* values = rows.values + i * rows.values_bytes;
    const std::byte* scales = rows.scales + i * rows.scales_bytes;
    wire.insert(wire.end(), values, values + rows.values_bytes);
    wire.insert(wire.end(), scales, scales + rows.scales_bytes);
  }
  return wire;
}

// The scale of a group of the row that begins at `wire`.
float ScaleOf(const std::byte* wire, int64_t hidden, int64_t group) {
  float scale = 0;
  std::memcpy(&scale, wire + hidden + group * 4, 4);
  return scale;
}

struct Travelled {
  std::vector<std::byte> wire;
  std::vector<float> values;
};

// One row there and back. `values` are those of the dtype.
Travelled Travel(DType dtype, const std::vector<float>& row) {
  const RowFormat format = Float8Of(dtype, static_cast<int64_t>(row.size()));
  Travelled travelled{.wire = Travelling(format, Encode(dtype, row), 1), .values = {}};
  auto bytes = Poisoned<std::byte>(format.matrix.row_bytes());
  const MutableRows out{.values = bytes.data(), .values_bytes = format.matrix.row_bytes()};
  PutRow(format, travelled.wire.data(), out, 0);
  travelled.values = Decode(dtype, bytes.data(), format.matrix.hidden);
  return travelled;
}

TEST(WireRowsTest, PlainRowsAreThoseOfTheProgram) {
  const std::vector<std::byte> values(6, std::byte{1});
  const std::vector<std::byte> scales(4, std::byte{2});
  const ConstRows given{values.data(), 3, scales.data(), 2};
  const WireRows travelling({}, given, 2);
  EXPECT_EQ(travelling.rows().values, values.data());
  EXPECT_EQ(travelling.rows().values_bytes, 3);
  EXPECT_EQ(travelling.rows().scales, scales.data());
  EXPECT_EQ(travelling.rows().scales_bytes, 2);
}

TEST(WireRowsTest, PlainRowsArriveInTwoParts) {
  const std::vector<std::byte> wire{std::byte{1}, std::byte{2}, std::byte{3}};
  auto values = Poisoned<std::byte>(4);
  auto scales = Poisoned<std::byte>(2);
  PutRow({}, wire.data(), {values.data(), 2, scales.data(), 1}, 1);
  EXPECT_EQ(values, (std::vector{std::byte{0xFF}, std::byte{0xFF}, std::byte{1}, std::byte{2}}));
  EXPECT_EQ(scales, (std::vector{std::byte{0xFF}, std::byte{3}}));
}

TEST(WireBytesTest, PlainRowsTravelAsTheyAre) { EXPECT_EQ(RowFormat{}.WireBytes(77), 77); }

TEST(WireBytesTest, Float8HasOneByteAColumnAndAScaleForEach128) {
  EXPECT_EQ(Float8Of(DType::kBFloat16, 1).WireBytes(2), 1 + 4);
  EXPECT_EQ(Float8Of(DType::kBFloat16, 128).WireBytes(256), 128 + 4);
  EXPECT_EQ(Float8Of(DType::kFloat32, 129).WireBytes(516), 129 + 8);
  EXPECT_EQ(Float8Of(DType::kFloat16, 7168).WireBytes(14336), 7168 + 56 * 4);
}

TEST(Float8Block128Test, EveryFiniteCodeArrivesAsItIsWhereTheScaleIsOne) {
  std::vector<float> row;
  for (int code = 0; code < 256; ++code) {
    if ((code & 0x7F) == Float8E4M3::kNan) continue;
    row.push_back(Float8E4M3::Load(static_cast<uint8_t>(code)));
  }
  // Each group gets a 448, which is the largest value.
  std::rotate(row.begin(), row.begin() + 64, row.end());
  const Travelled travelled = Travel(DType::kFloat32, row);
  EXPECT_EQ(ScaleOf(travelled.wire.data(), 254, 0), 1.0F);
  EXPECT_EQ(ScaleOf(travelled.wire.data(), 254, 1), 1.0F);
  for (size_t i = 0; i < row.size(); ++i) {
    EXPECT_EQ(std::bit_cast<uint32_t>(travelled.values[i]), std::bit_cast<uint32_t>(row[i]));
  }
}

// Compares random rows of all magnitudes with the formula, column by column.
TEST(Float8Block128Test, FollowsTheFormula) {
  Random random;
  for (const DType dtype : kDTypes) {
    for (const int64_t hidden : {1, 3, 127, 128, 129, 300, 512}) {
      std::vector<float> row;
      for (int64_t i = 0; i < hidden; ++i) {
        row.push_back(Rounded(dtype, random.Normal() * std::ldexp(1.0F, random.Below(28) - 14)));
      }
      const Travelled travelled = Travel(dtype, row);
      ASSERT_EQ(static_cast<int64_t>(travelled.wire.size()), Float8Of(dtype, hidden).WireBytes(0));
      for (int64_t i = 0; i < hidden; ++i) {
        const int64_t first = i / Float8Block128::kScaleColumns * Float8Block128::kScaleColumns;
        float amax = 1e-4F;
        for (int64_t j = first; j < std::min(first + Float8Block128::kScaleColumns, hidden); ++j) {
          amax = std::max(amax, std::abs(row[j]));
        }
        const float scale = amax / 448.0F;
        ASSERT_EQ(ScaleOf(travelled.wire.data(), hidden, i / Float8Block128::kScaleColumns), scale);
        const uint8_t code = Float8E4M3::Store(row[i] / scale);
        ASSERT_EQ(static_cast<uint8_t>(travelled.wire[i]), code);
        const float expected = Rounded(dtype, Float8E4M3::Load(code) * scale);
        ASSERT_EQ(std::bit_cast<uint32_t>(travelled.values[i]), std::bit_cast<uint32_t>(expected));
        // Half of the distance between the largest values, and the rounding of bfloat16.
        ASSERT_LE(std::abs(travelled.values[i] - row[i]), amax / 16);
      }
    }
  }
}

TEST(Float8Block128Test, EachRowHasScalesOfItsOwn) {
  const RowFormat format = Float8Of(DType::kFloat32, 130);
  std::vector<float> x(390, 1.0F);
  std::fill(x.begin() + 130, x.begin() + 260, 448.0F);
  const auto wire = Travelling(format, Encode(DType::kFloat32, x), 3);
  const int64_t row_bytes = format.WireBytes(0);
  for (const int64_t group : {0, 1}) {
    EXPECT_EQ(ScaleOf(wire.data(), 130, group), 1 / 448.0F);
    EXPECT_EQ(ScaleOf(wire.data() + row_bytes, 130, group), 1.0F);
    EXPECT_EQ(ScaleOf(wire.data() + 2 * row_bytes, 130, group), 1 / 448.0F);
  }
}

TEST(Float8Block128Test, ZeroAndTinyRowsHaveTheLeastScale) {
  const Travelled travelled = Travel(DType::kFloat32, {0.0F, -0.0F, 1e-12F, -1e-40F});
  EXPECT_EQ(ScaleOf(travelled.wire.data(), 4, 0), 1e-4F / 448.0F);
  for (const float value : travelled.values) EXPECT_EQ(value, 0.0F);
  EXPECT_FALSE(std::signbit(travelled.values[0]));
  EXPECT_TRUE(std::signbit(travelled.values[1]));
}

TEST(Float8Block128Test, TheLargestNumbersStayFinite) {
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

TEST(Float8Block128Test, ANanOrAnInfinityMakesItsGroupNanAndNoOther) {
  for (const DType dtype : kDTypes) {
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
          -std::numeric_limits<float>::infinity()}) {
      std::vector<float> row(300, 1.0F);
      row[130] = bad;
      const Travelled travelled = Travel(dtype, row);
      const float nan = Rounded(dtype, std::bit_cast<float>(kNanBits));
      for (int64_t i = 0; i < 300; ++i) {
        const float expected = i / Float8Block128::kScaleColumns == 1 ? nan : 1.0F;
        ASSERT_EQ(std::bit_cast<uint32_t>(travelled.values[i]), std::bit_cast<uint32_t>(expected));
      }
    }
  }
}

}  // namespace
}  // namespace jax_sm_free
