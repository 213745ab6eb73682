// The names of sends in compiled programs, for ranks that are in several processes.
//
// Every process must give a call site the same name. All processes know what the program was
// lowered to: its name, and the number of the send among the sends of the program. XLA may inline
// the function with a send several times. The copies of the send have the same program and number,
// so their order tells them apart. The order is the same wherever the same program is compiled.
//
// A process may have several equal programs. Their lowerings tell them apart: each has a number,
// which means nothing to other processes. Nothing tells apart two executables that were compiled
// from one lowering. So a copy of a call that is made after another copy has run belongs to another
// program.

#ifndef JAX_SM_FREE_CC_CPU_CALL_SITE_H_
#define JAX_SM_FREE_CC_CPU_CALL_SITE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace jax_sm_free {

// Longer texts are cut and end in a digest of the whole text.
inline constexpr size_t kMaxProgramBytes = 200;
inline constexpr size_t kMaxCallBytes = 360;

struct CallSite {
  int64_t number = 0;   // of this copy of the call, among all sends of the program
  std::string program;  // "jit_step"
  std::string call;     // "dispatch_send 3 (float32[6,7], int32[6,3])"
  int32_t num_copies = 1;
  // The number of the executable with this call; means nothing to other processes.
  int64_t executable = 0;

  // Whether two processes mean the same call. Each of them has an executable of its own.
  bool operator==(const CallSite& other) const;
  std::string Describe() const;
};

// One copy of a call: XLA makes it and later drops it. Thread-safe.
class CallCopy {
 public:
  ~CallCopy();
  CallCopy(const CallCopy&) = delete;
  CallCopy& operator=(const CallCopy&) = delete;

  // Call this when the call runs, not before.
  std::shared_ptr<const CallSite> Site();

 private:
  friend class CallSites;
  explicit CallCopy(std::shared_ptr<struct CallCopies> copies) : copies_(std::move(copies)) {}

  const std::shared_ptr<struct CallCopies> copies_;
  std::shared_ptr<const CallSite> site_;
};

// All calls of this process. Thread-safe.
class CallSites {
 public:
  static CallSites& Get();

  // `lowering` is the number of the lowering in this process. `call_number` is the number of the
  // call in `program`.
  std::unique_ptr<CallCopy> Add(const std::string& buffer, const std::string& program,
                                int64_t lowering, int64_t call_number, const std::string& call);

 private:
  std::mutex mutex_;
  std::unordered_map<std::string, std::weak_ptr<struct CallCopies>> latest_;
  int64_t num_executables_ = 0;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_CALL_SITE_H_
