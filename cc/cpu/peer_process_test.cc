#include "cc/cpu/peer_process.h"

#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <csignal>
#include <optional>
#include <string>
#include <thread>

#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

// A child that prints its name and waits for a signal. It is not reaped before Reap.
class Child {
 public:
  explicit Child(bool ends_its_first_thread = false) {
    std::array<int, 2> ends{};
    EXPECT_EQ(pipe(ends.data()), 0);
    pid_ = fork();
    if (pid_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      const std::string name = PeerProcess::OwnName();
      (void)!write(ends[1], name.data(), name.size());
      close(ends[1]);
      if (ends_its_first_thread) {
        std::thread([] { pause(); }).detach();
        syscall(SYS_exit,
                0);  // unlike pthread_exit, it throws nothing that the test framework would catch
      }
      pause();
      _exit(0);
    }
    close(ends[1]);
    char byte = 0;
    while (read(ends[0], &byte, 1) == 1) name_ += byte;
    close(ends[0]);
  }
  ~Child() { Reap(); }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  const std::string& name() const { return name_; }
  pid_t pid() const { return pid_; }
  void Signal(int signal) const { kill(pid_, signal); }
  void WaitUntilItHasEnded() const {
    siginfo_t info;
    waitid(P_PID, pid_, &info, WEXITED | WNOWAIT);
  }
  void Reap() {
    if (pid_ < 0) return;
    Signal(SIGKILL);
    waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }

 private:
  pid_t pid_ = -1;
  std::string name_;
};

TEST(PeerProcessTest, OneThatRunsOrIsStoppedHasNotEnded) {
  const Child child;
  const std::optional<PeerProcess> peer = PeerProcess::Find(child.name());
  ASSERT_TRUE(peer) << child.name();
  EXPECT_EQ(peer->pid(), child.pid());
  EXPECT_FALSE(peer->HasEnded());
  child.Signal(SIGSTOP);
  EXPECT_FALSE(peer->HasEnded());
}

TEST(PeerProcessTest, OneThatNobodyReapedHasEnded) {
  Child child;
  const std::optional<PeerProcess> peer = PeerProcess::Find(child.name());
  ASSERT_TRUE(peer);
  child.Signal(SIGKILL);
  child.WaitUntilItHasEnded();
  EXPECT_TRUE(peer->HasEnded());
  child.Reap();
  EXPECT_TRUE(peer->HasEnded());
}

TEST(PeerProcessTest, OneWhoseFirstThreadAloneHasEndedRuns) {
  const Child child(/*ends_its_first_thread=*/true);
  const std::optional<PeerProcess> peer = PeerProcess::Find(child.name());
  ASSERT_TRUE(peer);
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT_FALSE(peer->HasEnded());
}

TEST(PeerProcessTest, TheSameNumberGivenToAnotherIsAnEnd) {
  const Child child;
  const std::string earlier = child.name().substr(0, child.name().rfind(' ')) + " 1";
  EXPECT_FALSE(PeerProcess::Find(earlier));
}

TEST(PeerWatchTest, TellsOnceOfEachThatHasEnded) {
  using std::chrono::milliseconds;
  Child one;
  const Child other;
  PeerWatch watch;
  watch.Add(3, one.name());
  watch.Add(4, other.name());
  watch.Add(5, "another host's");
  const PeerWatch::Clock::time_point now = PeerWatch::Clock::now();
  EXPECT_TRUE(watch.TakeEnded(now).empty());
  one.Signal(SIGKILL);
  one.WaitUntilItHasEnded();
  EXPECT_TRUE(watch.TakeEnded(now + milliseconds(499)).empty());  // too early for a look
  const auto ended = watch.TakeEnded(now + milliseconds(500));
  ASSERT_EQ(ended.size(), 1U);
  EXPECT_EQ(ended[0].first, 3);
  EXPECT_EQ(ended[0].second, "process " + std::to_string(one.pid()) + " has ended");
  EXPECT_TRUE(watch.TakeEnded(now + milliseconds(1500)).empty());
}

TEST(PeerProcessTest, OneOfAnotherHostCanNotBeSeen) {
  const Child child;
  EXPECT_FALSE(PeerProcess::Find("another" + child.name()));
  EXPECT_FALSE(PeerProcess::Find("?"));
  EXPECT_FALSE(PeerProcess::Find(""));
}

}  // namespace
}  // namespace jax_sm_free
