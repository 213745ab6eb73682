// How executables of several processes count their starts.

#ifndef JAX_SM_FREE_CC_CPU_START_NUMBERS_H_
#define JAX_SM_FREE_CC_CPU_START_NUMBERS_H_

#include <cstdint>
#include <map>
#include <optional>
#include <tuple>

namespace jax_sm_free {

struct Executable {
  int32_t process = 0;
  int64_t number = 0;  // in its process

  bool operator==(const Executable&) const = default;
  bool operator<(const Executable& other) const {
    return std::tie(process, number) < std::tie(other.process, other.number);
  }
};

// By how much the numbers differ that executables give to starts of the same run, as far as that
// follows from what was learned. Numbers have 32 bits and wrap around. Not thread-safe.
class StartNumbers {
 public:
  // What `other` counts more than `one`; null if that is not known.
  std::optional<int32_t> Difference(const Executable& one, const Executable& other);

  // `difference` must not be known yet.
  void Learn(const Executable& one, const Executable& other, int32_t difference);

 private:
  // A forest: those that are known to each other have the same root.
  struct Node {
    Executable parent;
    uint32_t above = 0;  // what the node counts more than its parent
  };

  // The root, and what the executable counts more than that.
  Node Find(const Executable& executable);

  std::map<Executable, Node> nodes_;  // those that are no roots
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_START_NUMBERS_H_
