#include "cc/cpu/call_site.h"

#include <cstddef>
#include <cstdio>
#include <string_view>
#include <utility>

namespace jax_sm_free {
namespace {

// More sends than any program has, so that numbers of copies never meet.
constexpr int64_t kMaxCopies = int64_t{1} << 20;

std::string Shorten(const std::string& text, size_t max_bytes) {
  if (text.size() <= max_bytes) return text;
  uint64_t digest = 0xcbf29ce484222325U;  // FNV-1a; every process computes the same digest
  for (const char c : text) digest = (digest ^ static_cast<unsigned char>(c)) * 0x100000001b3U;
  char end[20];
  (void)std::snprintf(end, sizeof(end), "#%016llx", static_cast<unsigned long long>(digest));
  return text.substr(0, max_bytes - std::string_view(end).size()) + end;
}

}  // namespace

// The copies of one call in one program.
struct CallCopies {
  CallCopies(std::string program, int64_t call_number, std::string call, int64_t executable)
      : program(std::move(program)),
        call_number(call_number),
        call(std::move(call)),
        executable(executable) {}

  const std::string program;
  const int64_t call_number;
  const std::string call;
  const int64_t executable;
  std::mutex mutex;
  std::vector<CallCopy*> copies;  // in the order in which they were made
  bool closed = false;            // a copy has run, so no others are added
};

bool CallSite::operator==(const CallSite& other) const {
  return number == other.number && program == other.program && call == other.call &&
         num_copies == other.num_copies;
}

std::string CallSite::Describe() const {
  std::string text = program + ", " + call;
  if (num_copies > 1) {
    text += ", copy " + std::to_string(number % kMaxCopies) + " of " + std::to_string(num_copies);
  }
  return text;
}

CallCopy::~CallCopy() {
  const std::lock_guard lock(copies_->mutex);
  std::erase(copies_->copies, this);
}

std::shared_ptr<const CallSite> CallCopy::Site() {
  const std::lock_guard lock(copies_->mutex);
  if (std::exchange(copies_->closed, true)) return site_;
  const std::vector<CallCopy*>& all = copies_->copies;
  for (size_t i = 0; i < all.size(); ++i) {
    all[i]->site_ = std::make_shared<CallSite>(
        CallSite{.number = copies_->call_number * kMaxCopies + static_cast<int64_t>(i),
                 .program = copies_->program,
                 .call = copies_->call,
                 .num_copies = static_cast<int32_t>(all.size()),
                 .executable = copies_->executable});
  }
  return site_;
}

CallSites& CallSites::Get() {
  static auto* sites = new CallSites;  // never destroyed: programs may outlive static destructors
  return *sites;
}

std::unique_ptr<CallCopy> CallSites::Add(const std::string& buffer, const std::string& program,
                                         int64_t lowering, int64_t call_number,
                                         const std::string& call) {
  const std::string key = buffer + '\n' + program + '\n' + std::to_string(lowering) + '\n' +
                          std::to_string(call_number) + '\n' + call;
  const std::lock_guard lock(mutex_);
  std::erase_if(latest_, [](const auto& entry) { return entry.second.expired(); });
  const auto add_to = [](const std::shared_ptr<CallCopies>& copies) {
    const std::lock_guard copies_lock(copies->mutex);
    if (copies->closed) return std::unique_ptr<CallCopy>();
    std::unique_ptr<CallCopy> copy(new CallCopy(copies));
    copies->copies.push_back(copy.get());
    return copy;
  };
  if (const std::shared_ptr<CallCopies> copies = latest_[key].lock()) {
    if (std::unique_ptr<CallCopy> copy = add_to(copies)) return copy;
  }
  const auto made = std::make_shared<CallCopies>(Shorten(program, kMaxProgramBytes), call_number,
                                                 Shorten(call, kMaxCallBytes), num_executables_++);
  latest_[key] = made;
  return add_to(made);
}

}  // namespace jax_sm_free
