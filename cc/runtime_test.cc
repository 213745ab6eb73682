#include "cc/runtime.h"

#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
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
    was_open = Registry::Get().Find(id()) != nullptr;  // the registry must not be locked here
  }
  int64_t MessageBytes(int32_t /*device*/) const override { return 0; }
  Result<RankStats> Stats(int32_t /*device*/) override { return RankStats{}; }

  int num_closes = 0;
  bool was_open = false;
};

std::string NameOf(const FakeBuffer& buffer) { return "any #" + std::to_string(buffer.id()); }

std::shared_ptr<FakeBuffer> Opened() {
  auto buffer = std::make_shared<FakeBuffer>(Registry::Get().NextId());
  Registry::Get().Add(buffer, NameOf(*buffer));
  return buffer;
}

// A buffer that is closed at the end of the scope.
class Named {
 public:
  explicit Named(const std::string& name)
      : buffer_(std::make_shared<FakeBuffer>(Registry::Get().NextId())) {
    Registry::Get().Add(buffer_, name);
  }
  ~Named() { Close(); }
  void Close() { Registry::Get().Close(buffer_->id()); }

  bool IsFoundFor(std::string_view name) const {
    const Result<std::shared_ptr<Buffer>> found = Registry::Get().FindFor(name);
    return FaultOf(found) == nullptr && std::get<0>(found) == buffer_;
  }

 private:
  std::shared_ptr<FakeBuffer> buffer_;
};

std::string WhyNoneFor(std::string_view name) {
  const Result<std::shared_ptr<Buffer>> found = Registry::Get().FindFor(name);
  const Fault* fault = FaultOf(found);
  return fault == nullptr ? "" : fault->Describe();
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

TEST(RegistryTest, ADroppedBufferThatNobodyKeepsGoesAtOnceAndIsNotClosed) {
  auto buffer = Opened();
  const int64_t id = buffer->id();
  const std::weak_ptr<FakeBuffer> weak = buffer;
  Registry::Get().Drop(id);
  EXPECT_EQ(buffer->num_closes, 0);
  EXPECT_EQ(Registry::Get().Find(id), nullptr);
  EXPECT_EQ(Registry::Get().Keep(NameOf(*buffer)), nullptr);
  buffer.reset();
  EXPECT_TRUE(weak.expired());
}

TEST(RegistryTest, ADroppedBufferIsThereUntilTheLastLetsItGo) {
  const auto buffer = Opened();
  std::shared_ptr<const void> one = Registry::Get().Keep(NameOf(*buffer));
  Registry::Get().Drop(buffer->id());
  std::shared_ptr<const void> other = Registry::Get().Keep(NameOf(*buffer));
  one.reset();
  EXPECT_EQ(Registry::Get().Find(buffer->id()), buffer);
  other.reset();
  EXPECT_EQ(Registry::Get().Find(buffer->id()), nullptr);
  EXPECT_EQ(buffer->num_closes, 0);
}

TEST(RegistryTest, ADroppedBufferStandsInWhereNoOtherCan) {
  const std::string elsewhere = "any #-1";  // the name in a program from another process
  const auto dropped = Opened();
  const std::shared_ptr<const void> keeper = Registry::Get().Keep(elsewhere);
  ASSERT_NE(keeper, nullptr);
  Registry::Get().Drop(dropped->id());
  EXPECT_EQ(std::get<0>(Registry::Get().FindFor(elsewhere)), dropped);
  const auto open = Opened();
  EXPECT_EQ(std::get<0>(Registry::Get().FindFor(elsewhere)), open);
  Registry::Get().Close(open->id());
}

TEST(RegistryTest, ABufferThatIsNotDroppedStaysWhenNobodyKeepsIt) {
  const auto buffer = Opened();
  Registry::Get().Keep(NameOf(*buffer)).reset();
  EXPECT_EQ(Registry::Get().Find(buffer->id()), buffer);
  Registry::Get().Close(buffer->id());
}

TEST(RegistryTest, ClosingEndsABufferThatIsKept) {
  const auto buffer = Opened();
  const std::shared_ptr<const void> keeper = Registry::Get().Keep(NameOf(*buffer));
  EXPECT_TRUE(Registry::Get().Close(buffer->id()));
  EXPECT_EQ(Registry::Get().Find(buffer->id()), nullptr);
  EXPECT_EQ(buffer->num_closes, 1);
}

TEST(RegistryTest, CloseAllClosesWhatIsOpenAndWhatIsDropped) {
  const auto open = Opened();
  const auto dropped = Opened();
  const std::shared_ptr<const void> keeper = Registry::Get().Keep(NameOf(*dropped));
  Registry::Get().Drop(dropped->id());
  Registry::Get().CloseAll();
  EXPECT_EQ(open->num_closes, 1);
  EXPECT_EQ(dropped->num_closes, 1);
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

TEST(RegistryTest, AProgramFindsTheBufferOfItsName) {
  const Named first("axes x #0");
  const Named second("axes x #1");
  const Named other("axes y #0");
  EXPECT_TRUE(first.IsFoundFor("axes x #0"));
  EXPECT_TRUE(second.IsFoundFor("axes x #1"));
  EXPECT_TRUE(other.IsFoundFor("axes y #0"));
}

TEST(RegistryTest, AProgramFindsNoBufferOfAnotherDescription) {
  const Named other("axes q #0");
  const std::string why = WhyNoneFor("axes p #0");
  EXPECT_PRED_FORMAT2(IsSubstring, "made for to be open: axes p", why);
  EXPECT_PRED_FORMAT2(IsSubstring, "open buffers: axes q", why);
}

TEST(RegistryTest, TheOnlyBufferOfADescriptionStandsInForANumberThatNeverWas) {
  const Named only("axes o #3");
  EXPECT_TRUE(only.IsFoundFor("axes o #0"));
  const Named another("axes o #4");
  EXPECT_PRED_FORMAT2(IsSubstring, "2 that are alike", WhyNoneFor("axes o #0"));
}

TEST(RegistryTest, NoBufferStandsInForOneThatIsClosed) {
  Named closed("axes z #0");
  closed.Close();
  const Named next("axes z #1");
  EXPECT_PRED_FORMAT2(IsSubstring, "it is closed", WhyNoneFor("axes z #0"));
}

}  // namespace
}  // namespace jax_sm_free
