#include "cc/runtime.h"

#include <memory>
#include <optional>
#include <set>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using ::testing::IsSubstring;

class FakeBuffer : public Buffer {
 public:
  explicit FakeBuffer(int64_t id, std::vector<std::optional<Place>> places = {})
      : Buffer(id, Config{}, std::move(places)) {}

  void Close() override {
    ++num_closes;
    was_open = Registry::Get().Find(id()) != nullptr;  // the registry is not locked
  }
  int64_t MessageBytes(int32_t /*device*/) const override { return 0; }

  int num_closes = 0;
  bool was_open = false;
};

std::shared_ptr<FakeBuffer> Opened() {
  auto buffer = std::make_shared<FakeBuffer>(Registry::Get().NextId());
  Registry::Get().Add(buffer);
  return buffer;
}

Fault FaultWith(const char* seen) { return {.expected = "", .seen = seen, .exchange = {}}; }

TEST(BufferTest, FindsThePlaceOfADevice) {
  const FakeBuffer buffer(0, {std::nullopt, Place{.group = 1, .rank = 2, .position = 3}});
  const std::optional<Place> place = buffer.PlaceOf(1);
  ASSERT_TRUE(place.has_value());
  EXPECT_EQ(place->group, 1);
  EXPECT_EQ(place->rank, 2);
  EXPECT_EQ(place->position, 3);
}

TEST(BufferTest, DevicesOutsideTheMeshHaveNoPlace) {
  const FakeBuffer buffer(0, {std::nullopt, Place{}});
  EXPECT_FALSE(buffer.PlaceOf(0).has_value());
  EXPECT_FALSE(buffer.PlaceOf(2).has_value());
  EXPECT_FALSE(buffer.PlaceOf(-1).has_value());
}

TEST(BufferTest, HasNoFaultAtFirst) {
  FakeBuffer buffer(0);
  EXPECT_FALSE(buffer.TakeFault().has_value());
}

TEST(BufferTest, KeepsTheFirstFaultUntilItIsTaken) {
  FakeBuffer buffer(0);
  buffer.RecordFault(FaultWith("first"));
  buffer.RecordFault(FaultWith("second"));
  EXPECT_PRED_FORMAT2(IsSubstring, "first", buffer.TakeFault().value_or(""));
  EXPECT_FALSE(buffer.TakeFault().has_value());
  buffer.RecordFault(FaultWith("third"));
  EXPECT_PRED_FORMAT2(IsSubstring, "third", buffer.TakeFault().value_or(""));
}

TEST(RegistryTest, FindsAnOpenBuffer) {
  const auto buffer = Opened();
  EXPECT_EQ(Registry::Get().Find(buffer->id()), buffer);
  Registry::Get().Close(buffer->id());
}

TEST(RegistryTest, DoesNotFindWhatNeverWas) {
  EXPECT_EQ(Registry::Get().Find(Registry::Get().NextId()), nullptr);
  EXPECT_EQ(Registry::Get().Find(-1), nullptr);
}

TEST(RegistryTest, CloseTakesTheBufferOutAndClosesIt) {
  const auto buffer = Opened();
  EXPECT_TRUE(Registry::Get().Close(buffer->id()));
  EXPECT_EQ(buffer->num_closes, 1);
  EXPECT_FALSE(buffer->was_open);
  EXPECT_EQ(Registry::Get().Find(buffer->id()), nullptr);
}

TEST(RegistryTest, ClosesABufferOnce) {
  const auto buffer = Opened();
  EXPECT_TRUE(Registry::Get().Close(buffer->id()));
  EXPECT_FALSE(Registry::Get().Close(buffer->id()));
  EXPECT_EQ(buffer->num_closes, 1);
}

TEST(RegistryTest, AClosedBufferLivesAsLongAsItIsHeld) {
  auto buffer = Opened();
  const std::weak_ptr<FakeBuffer> weak = buffer;
  Registry::Get().Close(buffer->id());
  EXPECT_FALSE(weak.expired());
  buffer.reset();
  EXPECT_TRUE(weak.expired());
}

TEST(RegistryTest, NeverGivesAnIdTwice) {
  constexpr int kThreads = 4;
  constexpr int kIds = 100;
  std::vector<std::vector<int64_t>> ids(kThreads);
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (auto& own : ids) {
    threads.emplace_back([&own] {
      for (int i = 0; i < kIds; ++i) own.push_back(Registry::Get().NextId());
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::set<int64_t> all;
  for (const auto& own : ids) all.insert(own.begin(), own.end());
  EXPECT_EQ(all.size(), static_cast<size_t>(kThreads * kIds));
}

}  // namespace
}  // namespace jax_sm_free
