// Times of launches, and a table of them beside their floors.

#ifndef JAX_SM_FREE_BENCHMARKS_KERNEL_TIMES_H_
#define JAX_SM_FREE_BENCHMARKS_KERNEL_TIMES_H_

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace jax_sm_free::cuda {

inline void MustSucceed(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

template <typename T>
T* Take(int64_t count) {
  void* memory = nullptr;
  MustSucceed(cudaMalloc(&memory, count * sizeof(T)));
  MustSucceed(cudaMemset(memory, 0, count * sizeof(T)));
  return static_cast<T*>(memory);
}

class Table {
 public:
  Table() {
    MustSucceed(cudaEventCreate(&begin_));
    MustSucceed(cudaEventCreate(&end_));
  }

  void Time(const std::string& phase, const std::function<void()>& launch) {
    Begin();
    launch();
    End(phase);
  }

  // Of launches that follow.
  void Begin() {
    MustSucceed(cudaDeviceSynchronize());
    MustSucceed(cudaMemcpyAsync(filler_ + kFillerBytes, filler_, kFillerBytes,
                                cudaMemcpyDeviceToDevice, nullptr));
    MustSucceed(cudaEventRecord(begin_, nullptr));
  }

  void End(const std::string& phase) {
    MustSucceed(cudaEventRecord(end_, nullptr));
    MustSucceed(cudaDeviceSynchronize());
    float milliseconds = 0;
    MustSucceed(cudaEventElapsedTime(&milliseconds, begin_, end_));
    auto row = std::find_if(rows_.begin(), rows_.end(),
                            [&](const auto& other) { return other.first == phase; });
    if (row == rows_.end()) row = rows_.insert(rows_.end(), {phase, {}});
    row->second.push_back(milliseconds * 1000);
  }

  double Median(const std::string& phase) const {
    for (auto [name, times] : rows_) {
      if (name != phase) continue;
      std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
      return times[times.size() / 2];
    }
    return 0;
  }

  using Bytes = std::vector<std::pair<std::string, double>>;

  static void PrintHead() {
    std::printf("%-18s %8s %8s %8s %6s\n", "", "us", "MB", "floor", "ratio");
  }

  // `bytes`: what each phase moves, on the average over the ranks; 0 for what is not bytes.
  void Print(const Bytes& bytes, double bytes_per_us) const {
    for (const auto& [phase, moved] : bytes) PrintLine(phase, Median(phase), moved, bytes_per_us);
  }

  // The sum of these phases.
  void PrintSum(const std::string& name, const Bytes& bytes, double bytes_per_us) const {
    double us = 0;
    double moved = 0;
    for (const auto& [phase, of_phase] : bytes) {
      us += Median(phase);
      moved += of_phase;
    }
    PrintLine("= " + name, us, moved, bytes_per_us);
  }

 private:
  static void PrintLine(const std::string& name, double us, double moved, double bytes_per_us) {
    std::printf("%-18s %8.1f", name.c_str(), us);
    if (moved > 0) {
      const double floor = moved / bytes_per_us;
      std::printf(" %8.1f %8.1f %6.2f", moved / 1e6, floor, us / floor);
    }
    std::printf("\n");
  }

  static constexpr int64_t kFillerBytes = int64_t{1} << 29;

  std::byte* const filler_ = Take<std::byte>(2 * kFillerBytes);
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
  std::vector<std::pair<std::string, std::vector<double>>> rows_;
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_BENCHMARKS_KERNEL_TIMES_H_
