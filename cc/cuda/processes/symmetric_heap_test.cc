#include "cc/cuda/processes/symmetric_heap.h"

#include <array>
#include <cstddef>
#include <memory>
#include <vector>

#include "gtest/gtest.h"

namespace jax_sm_free::cuda {
namespace {

using Ids = SymmetricHeap::Ids;

class SymmetricHeapTest : public ::testing::Test {
 protected:
  std::shared_ptr<void> Take(size_t bytes, const Ids& dropped_by_all) {
    const auto allocate = [this](size_t size, size_t growth) -> void* {
      allocated_.push_back(size);
      growth_.push_back(growth);
      return is_full_ ? nullptr : &memory_[allocated_.size()];
    };
    return heap_.Take(bytes, dropped_by_all, {allocate, [this](void*) { ++num_freed_; }});
  }

  SymmetricHeap heap_;
  std::array<char, 16> memory_{};  // addresses alone
  std::vector<size_t> allocated_;
  std::vector<size_t> growth_;
  int num_freed_ = 0;
  bool is_full_ = false;
};

TEST_F(SymmetricHeapTest, UsesABlockAgainOnceAllHaveDroppedIt) {
  auto first = Take(64, {});
  const void* memory = first.get();
  first = nullptr;
  EXPECT_EQ(heap_.Dropped(), Ids{0});
  const auto second = Take(64, {});  // a peer has not dropped it
  EXPECT_NE(second.get(), memory);
  EXPECT_EQ(num_freed_, 0);
  const auto third = Take(64, {0});
  EXPECT_EQ(third.get(), memory);
  EXPECT_EQ(heap_.Dropped(), Ids{});
  EXPECT_EQ(allocated_.size(), 2U);
}

TEST_F(SymmetricHeapTest, FreesWhatAllHaveDroppedBeforeItAllocates) {
  auto first = Take(64, {});
  auto second = Take(32, {});
  auto third = Take(16, {});
  first = second = third = nullptr;
  const auto other = Take(128, {0, 1});  // a peer still uses the third
  EXPECT_EQ(num_freed_, 2);
  EXPECT_EQ(heap_.Dropped(), Ids{2});
  EXPECT_NE(Take(16, {2}), nullptr);
  EXPECT_EQ(allocated_, (std::vector<size_t>{64, 32, 16, 128}));
  EXPECT_EQ(growth_, (std::vector<size_t>{64, 32, 16, 32}));
}

TEST_F(SymmetricHeapTest, IdsStayTheSameWhereOneHasNoMemory) {
  is_full_ = true;
  EXPECT_EQ(Take(64, {}), nullptr);
  is_full_ = false;
  auto second = Take(64, {});
  second = nullptr;
  EXPECT_EQ(heap_.Dropped(), Ids{1});
}

}  // namespace
}  // namespace jax_sm_free::cuda
