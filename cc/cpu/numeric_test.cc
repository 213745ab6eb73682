#include "cc/cpu/numeric.h"

#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <ios>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

// What IEEE 754 says of a format with 16 bits.
struct BFloat16Rules {
  using Type = BFloat16;
  static constexpr int kMantissaBits = 7;
  static constexpr int kBias = 127;
};
struct Float16Rules {
  using Type = Float16;
  static constexpr int kMantissaBits = 10;
  static constexpr int kBias = 15;
};

// The value of a pattern without its sign. The pattern of infinity has the value of the power of
// two after the largest number: there, rounding to infinity begins.
template <typename Rules>
double ValueOf(int magnitude) {
  const int exponent = magnitude >> Rules::kMantissaBits;
  const int mantissa = magnitude & ((1 << Rules::kMantissaBits) - 1);
  if (exponent == 0) return std::ldexp(mantissa, 1 - Rules::kBias - Rules::kMantissaBits);
  return std::ldexp((1 << Rules::kMantissaBits) + mantissa,
                    exponent - Rules::kBias - Rules::kMantissaBits);
}

template <typename Rules>
constexpr int kInfinity = 0x7FFF >> Rules::kMantissaBits << Rules::kMantissaBits;

template <typename Rules>
class HalfTest : public ::testing::Test {};
using HalfTypes = ::testing::Types<BFloat16Rules, Float16Rules>;
TYPED_TEST_SUITE(HalfTest, HalfTypes);

TYPED_TEST(HalfTest, LoadsEveryFinitePatternExactly) {
  for (int magnitude = 0; magnitude < kInfinity<TypeParam>; ++magnitude) {
    const double expected = ValueOf<TypeParam>(magnitude);
    ASSERT_EQ(TypeParam::Type::Load(static_cast<uint16_t>(magnitude)), expected);
    ASSERT_EQ(TypeParam::Type::Load(static_cast<uint16_t>(magnitude | 0x8000)), -expected);
  }
}

TYPED_TEST(HalfTest, EveryPatternThatIsNoNanSurvivesLoadAndStore) {
  for (int bits = 0; bits <= 0xFFFF; ++bits) {
    if ((bits & 0x7FFF) > kInfinity<TypeParam>) continue;
    const auto pattern = static_cast<uint16_t>(bits);
    ASSERT_EQ(TypeParam::Type::Store(TypeParam::Type::Load(pattern)), pattern) << std::hex << bits;
  }
}

TYPED_TEST(HalfTest, EveryNanStaysANanOfItsSign) {
  for (int bits = 0; bits <= 0xFFFF; ++bits) {
    if ((bits & 0x7FFF) <= kInfinity<TypeParam>) continue;
    const float value = TypeParam::Type::Load(static_cast<uint16_t>(bits));
    ASSERT_TRUE(std::isnan(value));
    ASSERT_EQ(std::signbit(value), bits >= 0x8000);
    const uint16_t stored = TypeParam::Type::Store(value);
    ASSERT_GT(stored & 0x7FFF, kInfinity<TypeParam>);
    ASSERT_EQ(stored >= 0x8000, bits >= 0x8000);
  }
}

TYPED_TEST(HalfTest, NansOfFloat32StayNans) {
  for (const uint32_t bits : {0x7F800001U, 0x7F80FFFFU, 0x7FBFFFFFU, 0x7FC00000U, 0x7FFFFFFFU,
                              0xFF800001U, 0xFFFFFFFFU}) {
    const uint16_t stored = TypeParam::Type::Store(std::bit_cast<float>(bits));
    ASSERT_GT(stored & 0x7FFF, kInfinity<TypeParam>) << std::hex << bits;
    ASSERT_EQ(stored >> 15, bits >> 31) << std::hex << bits;
  }
}

// Tests each two neighbours, up to infinity: the tie between them, and the float32 on each side of
// the tie.
TYPED_TEST(HalfTest, StoresToNearestAndTiesToEven) {
  for (int low = 0; low < kInfinity<TypeParam>; ++low) {
    const int high = low + 1;
    const double tie = (ValueOf<TypeParam>(low) + ValueOf<TypeParam>(high)) / 2;
    const auto middle = static_cast<float>(tie);
    ASSERT_EQ(middle, tie);
    for (const int sign : {0, 0x8000}) {
      const auto store = [sign](float value) {
        return int{TypeParam::Type::Store(sign == 0 ? value : -value)};
      };
      ASSERT_EQ(store(middle), sign | (low % 2 == 0 ? low : high)) << std::hex << low;
      ASSERT_EQ(store(std::nextafter(middle, 0.0F)), sign | low) << std::hex << low;
      ASSERT_EQ(store(std::nextafter(middle, HUGE_VALF)), sign | high) << std::hex << low;
    }
  }
}

TYPED_TEST(HalfTest, StoresTheNearestOfRandomNumbers) {
  std::mt19937 random(3);
  for (int i = 0; i < 200000; ++i) {
    const auto value = std::bit_cast<float>(static_cast<uint32_t>(random()) & 0x7FFFFFFFU);
    if (std::isnan(value)) continue;
    const int stored = TypeParam::Type::Store(value);
    if (stored == kInfinity<TypeParam>) {
      ASSERT_GE(value, (ValueOf<TypeParam>(stored) + ValueOf<TypeParam>(stored - 1)) / 2);
      continue;
    }
    const double distance = std::abs(ValueOf<TypeParam>(stored) - value);
    ASSERT_LE(distance, std::abs(ValueOf<TypeParam>(stored + 1) - value));
    const int below = stored > 0 ? stored - 1 : 0;
    ASSERT_LE(distance, std::abs(ValueOf<TypeParam>(below) - value));
  }
}

TYPED_TEST(HalfTest, InfinitiesAndWhatIsTooLargeBecomeInfinities) {
  constexpr float kHuge = std::numeric_limits<float>::infinity();
  constexpr float kMax = std::numeric_limits<float>::max();
  EXPECT_EQ(TypeParam::Type::Store(kHuge), kInfinity<TypeParam>);
  EXPECT_EQ(TypeParam::Type::Store(-kHuge), kInfinity<TypeParam> | 0x8000);
  EXPECT_EQ(TypeParam::Type::Store(kMax), kInfinity<TypeParam>);
  EXPECT_EQ(TypeParam::Type::Load(kInfinity<TypeParam>), kHuge);
  EXPECT_EQ(TypeParam::Type::Load(kInfinity<TypeParam> | 0x8000), -kHuge);
}

TYPED_TEST(HalfTest, ZeroKeepsItsSign) {
  EXPECT_EQ(TypeParam::Type::Store(0.0F), 0);
  EXPECT_EQ(TypeParam::Type::Store(-0.0F), 0x8000);
  EXPECT_TRUE(std::signbit(TypeParam::Type::Load(0x8000)));
}

TYPED_TEST(HalfTest, TheSmallestFloat32BecomesZero) {
  constexpr float kTiny = std::numeric_limits<float>::denorm_min();
  EXPECT_EQ(TypeParam::Type::Store(kTiny), 0);
  EXPECT_EQ(TypeParam::Type::Store(-kTiny), 0x8000);
}

// float8_e4m3fn follows the same rules, except for its largest patterns.

constexpr int kFloat8Nan = 0x7F;

struct Float8Rules {
  static constexpr int kMantissaBits = 3;
  static constexpr int kBias = 7;
};

int StoreFloat8(float value) { return Float8E4M3::Store(value); }

TEST(Float8Test, LoadsEveryFiniteCodeExactlyAndStoresItAgain) {
  EXPECT_EQ(ValueOf<Float8Rules>(0x7E), 448.0);
  EXPECT_EQ(ValueOf<Float8Rules>(1), 0x1p-9);
  for (int code = 0; code < kFloat8Nan; ++code) {
    const float value = Float8E4M3::Load(static_cast<uint8_t>(code));
    ASSERT_EQ(value, ValueOf<Float8Rules>(code));
    ASSERT_EQ(StoreFloat8(value), code);
    const float negative = Float8E4M3::Load(static_cast<uint8_t>(code | 0x80));
    ASSERT_EQ(negative, -value);
    ASSERT_TRUE(std::signbit(negative));
    ASSERT_EQ(StoreFloat8(negative), code | 0x80);
  }
}

TEST(Float8Test, StoresToNearestAndTiesToEven) {
  for (int low = 0; low < kFloat8Nan - 1; ++low) {
    const int high = low + 1;
    const auto middle =
        static_cast<float>((ValueOf<Float8Rules>(low) + ValueOf<Float8Rules>(high)) / 2);
    for (const int sign : {0, 0x80}) {
      const auto store = [sign](float value) { return StoreFloat8(sign == 0 ? value : -value); };
      ASSERT_EQ(store(middle), sign | (low % 2 == 0 ? low : high)) << std::hex << low;
      ASSERT_EQ(store(std::nextafter(middle, 0.0F)), sign | low) << std::hex << low;
      ASSERT_EQ(store(std::nextafter(middle, HUGE_VALF)), sign | high) << std::hex << low;
    }
  }
}

TEST(Float8Test, WhatIsTooLargeBecomesTheLargest) {
  for (const float value : {449.0F, 463.9F, 464.0F, 480.0F, 1e10F, HUGE_VALF}) {
    EXPECT_EQ(StoreFloat8(value), 0x7E) << value;
    EXPECT_EQ(StoreFloat8(-value), 0xFE) << value;
  }
}

TEST(Float8Test, NanStaysNanOfItsSign) {
  for (const uint32_t bits : {0x7F800001U, 0x7FC00000U, 0x7FFFFFFFU, 0xFF800001U, 0xFFFFFFFFU}) {
    EXPECT_EQ(StoreFloat8(std::bit_cast<float>(bits)), kFloat8Nan | (bits >> 31 << 7));
  }
  EXPECT_TRUE(std::isnan(Float8E4M3::Load(0x7F)));
  EXPECT_TRUE(std::isnan(Float8E4M3::Load(0xFF)));
}

TEST(Float32Test, LoadAndStoreChangeNothing) {
  EXPECT_EQ(Float32::Load(1.5F), 1.5F);
  EXPECT_EQ(Float32::Store(-0x1p-149F), -0x1p-149F);
}

// Whether the thread keeps subnormals. `volatile` stops the compiler from multiplying itself.
bool KeepsSubnormals() {
  volatile float small = std::numeric_limits<float>::min();
  volatile float half = 0.5F;
  return small * half != 0.0F;
}

#ifdef __SSE2__

// Flushes subnormals until the end of the scope, as XLA's threads do.
class FlushScope {
 public:
  FlushScope() : outer_(_mm_getcsr()) { _mm_setcsr(outer_ | kFlushToZero | kDenormalsAreZero); }
  ~FlushScope() { _mm_setcsr(outer_); }
  FlushScope(const FlushScope&) = delete;
  FlushScope& operator=(const FlushScope&) = delete;

 private:
  static constexpr unsigned kFlushToZero = 0x8000;
  static constexpr unsigned kDenormalsAreZero = 0x0040;
  const unsigned outer_;
};

// The value that each pattern loads as, and the pattern that float32 numbers are stored as: those
// around every tie, of every exponent.
template <typename Type>
std::vector<uint32_t> Conversions() {
  std::vector<uint32_t> results;
  for (uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    results.push_back(std::bit_cast<uint32_t>(Type::Load(static_cast<uint16_t>(bits))));
    for (const uint32_t low : {0x0FFFU, 0x1000U, 0x7FFFU, 0x8000U, 0x8001U}) {
      results.push_back(Type::Store(std::bit_cast<float>(bits << 16 | low)));
    }
  }
  return results;
}

TYPED_TEST(HalfTest, ConversionsDoNotDependOnTheFloatMode) {
  const std::vector<uint32_t> expected = Conversions<typename TypeParam::Type>();
  const FlushScope flush;
  ASSERT_FALSE(KeepsSubnormals());
  EXPECT_EQ(Conversions<typename TypeParam::Type>(), expected);
}

TEST(Float8Test, ConversionsDoNotDependOnTheFloatMode) {
  const auto convert = [] {
    std::vector<uint32_t> results;
    for (uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
      results.push_back(std::bit_cast<uint32_t>(Float8E4M3::Load(static_cast<uint8_t>(bits))));
      results.push_back(Float8E4M3::Store(std::bit_cast<float>(bits << 16)));
      results.push_back(Float8E4M3::Store(std::bit_cast<float>(bits << 16 | 1)));
    }
    return results;
  };
  const std::vector<uint32_t> expected = convert();
  const FlushScope flush;
  ASSERT_FALSE(KeepsSubnormals());
  EXPECT_EQ(convert(), expected);
}

TEST(IeeeScopeTest, KeepsSubnormalsInsideAndRestoresTheModeOutside) {
  const FlushScope flush;
  ASSERT_FALSE(KeepsSubnormals());
  {
    const IeeeScope ieee;
    EXPECT_TRUE(KeepsSubnormals());
  }
  EXPECT_FALSE(KeepsSubnormals());
}

TEST(FloatModeTest, CarriesTheModeOfAThreadToAnother) {
  const FlushScope flush;
  const FloatMode mode;
  bool before = false;
  bool after = true;
  std::thread([&] {
    const IeeeScope ieee;  // a thread starts with the mode of its creator
    before = KeepsSubnormals();
    mode.Apply();
    after = KeepsSubnormals();
  }).join();
  EXPECT_TRUE(before);
  EXPECT_FALSE(after);
}

#endif  // __SSE2__

TEST(IeeeScopeTest, RestoresTheRoundingMode) {
  ASSERT_EQ(std::fesetround(FE_UPWARD), 0);
  {
    const IeeeScope ieee;
    EXPECT_EQ(std::fegetround(), FE_TONEAREST);
  }
  EXPECT_EQ(std::fegetround(), FE_UPWARD);
  std::fesetround(FE_TONEAREST);
}

}  // namespace
}  // namespace jax_sm_free
