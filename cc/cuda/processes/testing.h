// Several processes in the threads of one, for tests.

#ifndef JAX_SM_FREE_CC_CUDA_PROCESSES_TESTING_H_
#define JAX_SM_FREE_CC_CUDA_PROCESSES_TESTING_H_

#include <barrier>
#include <cstdint>
#include <functional>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "cc/cuda/processes/gpu_id.h"
#include "cc/cuda/processes/rendezvous.h"

namespace jax_sm_free::cuda::testing {

inline GpuId MakeGpuId(int32_t number) {
  GpuId id{};
  id[0] = static_cast<char>(number);
  return id;
}

// Runs `body` as each of `count` processes, the ranks of one group, at the same time.
inline void RunProcesses(int32_t count, const std::function<void(const Processes&)>& body) {
  std::barrier barrier(count);
  std::vector<std::string> texts(count);
  std::vector<std::thread> threads;
  std::vector<int32_t> of_rank(count);
  std::iota(of_rank.begin(), of_rank.end(), 0);
  for (int32_t index = 0; index < count; ++index) {
    const auto exchange = [&barrier, &texts, index](const std::string& text) {
      texts[index] = text;
      barrier.arrive_and_wait();
      std::vector<std::string> heard = texts;
      barrier.arrive_and_wait();  // Nobody writes the next text before all have read this one.
      return heard;
    };
    const Processes processes{index, of_rank, exchange, [](const std::string& /*text*/) {}};
    threads.emplace_back([&body, processes] { body(processes); });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace jax_sm_free::cuda::testing

#endif  // JAX_SM_FREE_CC_CUDA_PROCESSES_TESTING_H_
