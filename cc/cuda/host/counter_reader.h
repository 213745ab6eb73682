// Reads the counters of a rank while its kernels run.

#ifndef JAX_SM_FREE_CC_CUDA_HOST_COUNTER_READER_H_
#define JAX_SM_FREE_CC_CUDA_HOST_COUNTER_READER_H_

#include <cuda_runtime_api.h>

#include <mutex>

#include "cc/cuda/device_state.h"
#include "cc/cuda/rank_view.h"
#include "cc/fault.h"
#include "cc/rank_stats.h"

namespace jax_sm_free::cuda {

// Copies a few hundred bytes on a stream of its own. The copy waits for no kernel. It waits for
// copies that the same copy engine has begun, and while the CUDA driver lets no thread enqueue
// anything (device_state.h). Thread-safe.
class CounterReader {
 public:
  // `copy` is pinned memory that this reader alone uses.
  CounterReader(int device, const RankView& view, Counters* copy);
  ~CounterReader();
  CounterReader(const CounterReader&) = delete;
  CounterReader& operator=(const CounterReader&) = delete;

  Result<RankStats> Read();

 private:
  const int device_;
  const RankView view_;
  Counters* const copy_;
  std::mutex mutex_;
  cudaStream_t stream_ = nullptr;
  cudaError_t status_ = cudaSuccess;  // of the call that made the stream
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_HOST_COUNTER_READER_H_
