#include "cc/cpu/peer_process.h"

#include <unistd.h>

#include <array>
#include <cerrno>
#include <fstream>
#include <sstream>
#include <vector>

namespace jax_sm_free {
namespace {

// Fields of /proc/PID/stat, numbered as in proc(5).
constexpr size_t kState = 3;
constexpr size_t kNumThreads = 20;
constexpr size_t kStart = 22;

struct Stat {
  char state = '?';
  int64_t num_threads = 0;
  uint64_t start = 0;
};

enum class Seen { kThere, kGone, kUnknown };

Seen Look(int64_t pid, Stat& stat) {
  errno = 0;
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string text;
  if (!std::getline(file, text)) {
    // Only these errors say something about the process. Too many open files, for example, does
    // not.
    return errno == ENOENT || errno == ESRCH ? Seen::kGone : Seen::kUnknown;
  }
  // The second field is the name of the program in parentheses. The name may contain any character.
  const size_t name_end = text.rfind(')');
  if (name_end == std::string::npos) return Seen::kUnknown;
  std::istringstream rest(text.substr(name_end + 1));
  std::vector<std::string> fields;
  for (std::string field; rest >> field;) fields.push_back(field);
  if (fields.size() <= kStart - kState) return Seen::kUnknown;
  stat.state = fields[0][0];
  stat.num_threads = std::stoll(fields[kNumThreads - kState]);
  stat.start = std::stoull(fields[kStart - kState]);
  return Seen::kThere;
}

std::string LinkAt(const char* path) {
  std::array<char, 256> target{};
  const ssize_t length = readlink(path, target.data(), target.size());
  return length > 0 ? std::string(target.data(), length) : std::string("?");
}

// Equal in processes that see each other under the same numbers.
std::string OwnPlace() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string boot;
  if (!std::getline(file, boot)) boot = "?";
  return boot + "/" + LinkAt("/proc/self/ns/pid");
}

}  // namespace

std::string PeerProcess::OwnName() {
  // Not getpid(): /proc may be that of another namespace.
  const std::string pid = LinkAt("/proc/self");
  Stat stat;
  if (pid == "?" || Look(std::stoll(pid), stat) != Seen::kThere) return "?";
  return OwnPlace() + " " + pid + " " + std::to_string(stat.start);
}

std::optional<PeerProcess> PeerProcess::Find(const std::string& name) {
  std::istringstream words(name);
  std::string place;
  int64_t pid = 0;
  uint64_t start = 0;
  if (!(words >> place >> pid >> start) || place != OwnPlace()) return std::nullopt;
  Stat stat;
  if (Look(pid, stat) != Seen::kThere || stat.start != start) return std::nullopt;
  return PeerProcess(pid, start);
}

bool PeerProcess::HasEnded() const {
  Stat stat;
  switch (Look(pid_, stat)) {
    case Seen::kGone:
      return true;
    case Seen::kUnknown:
      return false;
    case Seen::kThere:
      break;
  }
  // State Z also means that only the first thread of the process has ended.
  return stat.start != start_ || ((stat.state == 'Z' || stat.state == 'X') && stat.num_threads < 2);
}

void PeerWatch::Add(int32_t peer, const std::string& name) {
  if (const auto process = PeerProcess::Find(name)) peers_.emplace_back(peer, *process);
}

std::vector<std::pair<int32_t, std::string>> PeerWatch::TakeEnded(Clock::time_point now) {
  std::vector<std::pair<int32_t, std::string>> ended;
  if (now - looked_ < kInterval) return ended;
  looked_ = now;
  std::erase_if(peers_, [&ended](const auto& entry) {
    const auto& [peer, process] = entry;
    if (!process.HasEnded()) return false;
    ended.emplace_back(peer, "process " + std::to_string(process.pid()) + " has ended");
    return true;
  });
  return ended;
}

}  // namespace jax_sm_free
