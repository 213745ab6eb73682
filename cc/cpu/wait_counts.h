// How long the ranks of this process have waited for the messages of each other rank.

#ifndef JAX_SM_FREE_CC_CPU_WAIT_COUNTS_H_
#define JAX_SM_FREE_CC_CPU_WAIT_COUNTS_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace jax_sm_free {

// By member, as in transport.h, and by source within its group.
class WaitCounts {
 public:
  WaitCounts(size_t num_members, int32_t ep_size)
      : ep_size_(ep_size), nanoseconds_(num_members * ep_size) {}

  void Add(int32_t member, int32_t source, std::chrono::nanoseconds waited) {
    nanoseconds_[int64_t{member} * ep_size_ + source] += waited.count();
  }

  // By source.
  std::vector<int64_t> Of(int32_t member) const {
    const auto first = nanoseconds_.begin() + int64_t{member} * ep_size_;
    return {first, first + ep_size_};
  }

 private:
  const int32_t ep_size_;
  std::vector<int64_t> nanoseconds_;
};

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_WAIT_COUNTS_H_
