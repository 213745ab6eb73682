// How executables of several processes number their starts.

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

// The differences between the numbers that executables give to the start of the same run, as far as
// they follow from known differences. Numbers have 32 bits and wrap around. Not thread-safe.
class StartNumbers {
 public:
  // The number of `other` minus the number of `one`; null if it is not known.
  std::optional<int32_t> Difference(const Executable& one, const Executable& other);

  // The difference must not be known yet.
  void Learn(const Executable& one, const Executable& other, int32_t difference);

 private:
  // Nodes form a forest. Executables with a known difference have the same root.
  struct Node {
    Executable parent;
    uint32_t above = 0;  // the number of this node minus that of its parent
  };

  // The root, and the number of the executable minus that of the root.
  Node Find(const Executable& executable);

  std::map<Executable, Node> nodes_;  // executables that are not roots
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_START_NUMBERS_H_
