// The names of sends in compiled programs, for ranks that are in several processes.
//
// A call site has to be called the same by every process. What processes have in common is what the
// program was lowered to: its name, and the number of the send among those of the program. XLA may
// inline the function that a send is in several times; those copies have all that in common, and
// are told apart by their order, which is the same wherever the same program is compiled.
//
// Equal programs of a process are told apart by their lowerings, which have numbers in each process
// and mean nothing to another. Nothing tells apart what one lowering is compiled to twice: what is
// made after one of its copies has run is taken for another program's.

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

// Longer texts are cut, and end in a digest of all of them.
inline constexpr size_t kMaxProgramBytes = 200;
inline constexpr size_t kMaxCallBytes = 360;

struct CallSite {
  int64_t number = 0;   // of this copy of the call, among all sends of the program
  std::string program;  // "jit_step"
  std::string call;     // "dispatch_send 3 (float32[6,7], int32[6,3])"
  int32_t num_copies = 1;
  int64_t executable = 0;  // with this call, among those of its process; means nothing to others

  // Whether processes mean the same call, each of an executable of its own.
  bool operator==(const CallSite& other) const;
  std::string Describe() const;
};

// One copy of a call, from when XLA makes it until it drops it. Thread-safe.
class CallCopy {
 public:
  ~CallCopy();
  CallCopy(const CallCopy&) = delete;
  CallCopy& operator=(const CallCopy&) = delete;

  // To be asked for when the call runs, not before.
  std::shared_ptr<const CallSite> Site();

 private:
  friend class CallSites;
  explicit CallCopy(std::shared_ptr<struct CallCopies> copies) : copies_(std::move(copies)) {}

  const std::shared_ptr<struct CallCopies> copies_;
  std::shared_ptr<const CallSite> site_;
};

// The calls of this process. Thread-safe.
class CallSites {
 public:
  static CallSites& Get();

  // `lowering` is the number of the call's lowering in this process, `call_number` the call's in
  // `program`.
  std::unique_ptr<CallCopy> Add(const std::string& buffer, const std::string& program,
                                int64_t lowering, int64_t call_number, const std::string& call);

 private:
  std::mutex mutex_;
  std::unordered_map<std::string, std::weak_ptr<struct CallCopies>> latest_;
  int64_t num_executables_ = 0;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_CALL_SITE_H_
