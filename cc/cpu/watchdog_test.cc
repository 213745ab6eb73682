#include "cc/cpu/watchdog.h"

#include <chrono>
#include <future>
#include <latch>
#include <memory>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using std::chrono::duration;
using std::chrono::milliseconds;
using Clock = Watchdog::Clock;

// A delay that is long enough for a busy machine to do something before it ends.
constexpr milliseconds kDelay(200);

TEST(WatchdogTest, CallsBackNotBeforeTheDelayIsOver) {
  std::promise<Clock::time_point> expired;
  const Clock::time_point start = Clock::now();
  Watchdog::Get().Start(milliseconds(20), [&expired] { expired.set_value(Clock::now()); });
  EXPECT_GE(expired.get_future().get() - start, milliseconds(20));
}

TEST(WatchdogTest, CallsBackOnAThreadOfItsOwn) {
  std::promise<std::thread::id> expired;
  Watchdog::Get().Start(milliseconds(0),
                        [&expired] { expired.set_value(std::this_thread::get_id()); });
  EXPECT_NE(expired.get_future().get(), std::this_thread::get_id());
}

TEST(WatchdogTest, ExpiresInTheOrderOfTheTimes) {
  std::vector<int> order;  // only the thread of the watchdog writes it
  std::latch all(3);
  const auto expire = [&](int number) {
    return [&, number] {
      order.push_back(number);
      all.count_down();
    };
  };
  Watchdog::Get().Start(3 * kDelay, expire(3));
  Watchdog::Get().Start(1 * kDelay, expire(1));
  Watchdog::Get().Start(2 * kDelay, expire(2));
  all.wait();
  EXPECT_EQ(order, (std::vector<int>{1, 2, 3}));
}

TEST(WatchdogTest, AnEarlyTimerDoesNotWaitForALateOne) {
  const Watchdog::Timer late = Watchdog::Get().Start(duration<double>(600), [] { FAIL(); });
  std::promise<void> expired;
  Watchdog::Get().Start(milliseconds(1), [&expired] { expired.set_value(); });
  expired.get_future().wait();
  Watchdog::Get().Cancel(late);
}

TEST(WatchdogTest, ACancelledTimerNeverExpires) {
  const Watchdog::Timer timer = Watchdog::Get().Start(kDelay, [] { FAIL(); });
  Watchdog::Get().Cancel(timer);
  std::this_thread::sleep_for(kDelay + milliseconds(50));
}

TEST(WatchdogTest, CancelLeavesOtherTimersAlone) {
  std::promise<void> expired;
  const Watchdog::Timer timer = Watchdog::Get().Start(kDelay, [] { FAIL(); });
  Watchdog::Get().Start(kDelay, [&expired] { expired.set_value(); });
  Watchdog::Get().Cancel(timer);
  expired.get_future().wait();
}

TEST(WatchdogTest, ATimerBehindACancelledOneExpires) {
  std::promise<Clock::time_point> expired;
  const Clock::time_point start = Clock::now();
  Watchdog::Get().Cancel(Watchdog::Get().Start(milliseconds(10), [] {}));
  Watchdog::Get().Start(milliseconds(20), [&expired] { expired.set_value(Clock::now()); });
  EXPECT_GE(expired.get_future().get() - start, milliseconds(20));
}

TEST(WatchdogTest, CancelAfterExpiryIsHarmless) {
  std::promise<void> expired;
  const Watchdog::Timer timer =
      Watchdog::Get().Start(milliseconds(0), [&expired] { expired.set_value(); });
  expired.get_future().wait();
  Watchdog::Get().Cancel(timer);
}

TEST(WatchdogTest, CancelGivesBackWhatTheTimerHolds) {
  auto held = std::make_shared<int>(1);
  const Watchdog::Timer timer = Watchdog::Get().Start(duration<double>(600), [held] {});
  EXPECT_EQ(held.use_count(), 2);
  Watchdog::Get().Cancel(timer);
  EXPECT_EQ(held.use_count(), 1);
}

TEST(WatchdogTest, AnExpiringTimerMayStartAnother) {
  std::promise<void> expired;
  Watchdog::Get().Start(milliseconds(1), [&expired] {
    Watchdog::Get().Start(milliseconds(1), [&expired] { expired.set_value(); });
  });
  expired.get_future().wait();
}

TEST(WatchdogTest, TheLongestTimeoutIsNotOverAtOnce) {
  const Watchdog::Timer timer = Watchdog::Get().Start(duration<double>(1e6), [] { FAIL(); });
  std::this_thread::sleep_for(milliseconds(50));
  Watchdog::Get().Cancel(timer);
}

TEST(WatchdogTest, ThreadsMayStartAndCancelAtOnce) {
  std::vector<std::thread> threads;
  threads.reserve(4);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([] {
      for (int i = 0; i < 500; ++i) {
        const duration<double> delay = milliseconds(i % 3);
        Watchdog::Get().Cancel(Watchdog::Get().Start(delay, [] {}));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace jax_sm_free
