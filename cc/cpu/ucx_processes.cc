#include "cc/cpu/ucx_processes.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstdlib>
#include <utility>

#include "gtest/gtest.h"

namespace jax_sm_free::testing {
namespace {

// Set in an echo: its number and how many processes there are.
constexpr char kSelf[] = "SMF_ECHO_SELF";
constexpr char kNumPeers[] = "SMF_ECHO_NUM_PEERS";

void WriteAll(int fd, const void* data, size_t bytes) {
  const auto* next = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = write(fd, next, bytes);
    if (written <= 0) return;  // the reader will notice
    next += written;
    bytes -= static_cast<size_t>(written);
  }
}

bool ReadAll(int fd, void* data, size_t bytes) {
  auto* next = static_cast<char*>(data);
  while (bytes > 0) {
    const ssize_t got = read(fd, next, bytes);
    if (got <= 0) return false;
    next += got;
    bytes -= static_cast<size_t>(got);
  }
  return true;
}

void WriteText(int fd, const std::string& text) {
  const uint64_t bytes = text.size();
  WriteAll(fd, &bytes, sizeof(bytes));
  WriteAll(fd, text.data(), bytes);
}

std::string ReadText(int fd) {
  uint64_t bytes = 0;
  if (!ReadAll(fd, &bytes, sizeof(bytes))) return {};
  std::string text(bytes, '\0');
  return ReadAll(fd, text.data(), bytes) ? text : std::string();
}

// Replaces the child that was forked by the test program.
[[noreturn]] void BecomeEcho(int32_t self, int32_t num_peers, int in, int out) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  dup2(in, STDIN_FILENO);
  dup2(out, 3);  // the test framework writes to standard output
  // The report on this test program is the first process's.
  for (const char* name : {"XML_OUTPUT_FILE", "TEST_PREMATURE_EXIT_FILE", "GTEST_OUTPUT"}) {
    unsetenv(name);
  }
  setenv(kSelf, std::to_string(self).c_str(), 1);
  setenv(kNumPeers, std::to_string(num_peers).c_str(), 1);
  execl("/proc/self/exe", "echo", "--gtest_also_run_disabled_tests", "--gtest_brief=1",
        "--gtest_filter=EchoProcess.DISABLED_Main", nullptr);
  _exit(127);
}

void RunEcho(int32_t self, int32_t num_peers) {
  Node node(self, num_peers);
  node.set_on_arrival([&node](Arrival arrival) {
    const auto& [src, dst, number, bytes] = arrival.note;
    const bool is_measured = number == EchoProcess::kMeasured;
    EXPECT_TRUE(is_measured || IsIntact(arrival, arrival.note));
    node.Send(arrival.peer, number, is_measured ? 0 : bytes);
  });
  WriteText(3, node.wire().address());  // from here on, messages may come
  std::vector<std::string> addresses(num_peers);
  for (std::string& address : addresses) address = ReadText(STDIN_FILENO);
  node.wire().Connect(addresses);
  char byte = 0;
  while (read(STDIN_FILENO, &byte, 1) > 0) {
  }
  node.wire().Close();
}

TEST(EchoProcess, DISABLED_Main) {
  if (std::getenv(kSelf) == nullptr) GTEST_SKIP() << "for tests that start it";
  RunEcho(std::atoi(std::getenv(kSelf)), std::atoi(std::getenv(kNumPeers)));
}

}  // namespace

EchoProcess::EchoProcess(int32_t self, int32_t num_peers) {
  std::array<int, 2> in{};
  std::array<int, 2> out{};
  // Other processes must not hold these ends, or the input of this one never ends.
  if (pipe2(in.data(), O_CLOEXEC) != 0 || pipe2(out.data(), O_CLOEXEC) != 0) std::abort();
  pid_ = fork();
  if (pid_ == 0) BecomeEcho(self, num_peers, in[0], out[1]);
  close(in[0]);
  close(out[1]);
  to_ = in[1];
  from_ = out[0];
  address_ = ReadText(from_);
  EXPECT_FALSE(address_.empty()) << "process " << self << " did not start";
}

EchoProcess::~EchoProcess() {
  if (pid_ < 0) return;
  Signal(SIGKILL);
  Finish();
}

void EchoProcess::Connect(const std::vector<std::string>& addresses) const {
  for (const std::string& address : addresses) WriteText(to_, address);
}

void EchoProcess::Signal(int signal) const { kill(pid_, signal); }

int EchoProcess::Finish() {
  close(to_);
  int status = 0;
  waitpid(std::exchange(pid_, -1), &status, 0);
  close(from_);
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

Echoes::Echoes(int32_t num_peers) : node(0, num_peers), processes(num_peers) {
  std::vector<std::string> addresses{node.wire().address()};
  for (int32_t i = 1; i < num_peers; ++i) {
    processes[i] = std::make_unique<EchoProcess>(i, num_peers);
    addresses.push_back(processes[i]->address());
  }
  for (int32_t i = 1; i < num_peers; ++i) processes[i]->Connect(addresses);
  node.wire().Connect(addresses);
}

}  // namespace jax_sm_free::testing
