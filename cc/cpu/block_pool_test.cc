#include "cc/cpu/block_pool.h"

#include <cstdint>
#include <cstring>
#include <optional>
#include <set>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

TEST(BlockPoolTest, BlocksAreAlignedToSixtyFourBytes) {
  BlockPool pool(100);
  for (int i = 0; i < 5; ++i) {
    const BlockPool::Block block = pool.Take();
    EXPECT_EQ(reinterpret_cast<uintptr_t>(block.get()) % 64, 0U);
  }
}

TEST(BlockPoolTest, BlocksInUseAreDistinct) {
  BlockPool pool(64);
  std::vector<BlockPool::Block> blocks;
  std::set<std::byte*> addresses;
  for (int i = 0; i < 10; ++i) {
    blocks.push_back(pool.Take());
    addresses.insert(blocks.back().get());
  }
  EXPECT_EQ(addresses.size(), 10U);
  EXPECT_EQ(pool.num_blocks(), 10);
}

TEST(BlockPoolTest, AllBytesOfABlockCanBeWritten) {
  BlockPool pool(1000);
  const BlockPool::Block block = pool.Take();
  std::memset(block.get(), 0x5A, 1000);
  EXPECT_EQ(block[999], std::byte{0x5A});
}

TEST(BlockPoolTest, TheBlockGivenBackLastIsUsedAgainFirst) {
  BlockPool pool(64);
  BlockPool::Block first = pool.Take();
  BlockPool::Block second = pool.Take();
  std::byte* const last = first.get();
  second.reset();
  first.reset();
  EXPECT_EQ(pool.Take().get(), last);
}

TEST(BlockPoolTest, MakesNoNewBlockWhileOneIsFree) {
  BlockPool pool(64);
  for (int i = 0; i < 100; ++i) pool.Take();
  EXPECT_EQ(pool.num_blocks(), 1);
}

TEST(BlockPoolTest, ABlockMayOutliveItsPool) {
  std::optional<BlockPool> pool(64);
  const BlockPool::Block block = pool->Take();
  pool.reset();
  std::memset(block.get(), 0, 64);
}

TEST(BlockPoolTest, ThreadsShareAPool) {
  BlockPool pool(64);
  constexpr int kThreads = 4;
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&pool, i] {
      for (int j = 0; j < 1000; ++j) {
        const BlockPool::Block block = pool.Take();
        std::memset(block.get(), i, 64);
        EXPECT_EQ(block[63], static_cast<std::byte>(i));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(pool.num_blocks(), kThreads);
}

}  // namespace
}  // namespace jax_sm_free
