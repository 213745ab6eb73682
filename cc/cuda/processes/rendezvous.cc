#include "cc/cuda/processes/rendezvous.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <random>

#include "cc/cuda/host/refusal.h"

namespace jax_sm_free::cuda {
namespace {

// Copies as much as leaves room for the 0 at the end, which `to` has already.
template <size_t kSize>
void CopyText(const std::string& text, char (&to)[kSize]) {
  std::memcpy(to, text.data(), std::min(text.size(), kSize - 1));
}

bool MayShareGpus() { return std::getenv("JAX_SM_FREE_SHARED_GPUS") != nullptr; }

Fault SameGpu(int32_t first, int32_t second) {
  return Refuse("a GPU for each process",
                "processes " + std::to_string(first) + " and " + std::to_string(second) +
                    " of the mesh with the same one (CUDA_VISIBLE_DEVICES, or local_device_ids of "
                    "jax.distributed.initialize, tell them apart; with JAX_SM_FREE_SHARED_GPUS=1 "
                    "they may share it, slowly)");
}

}  // namespace

Rendezvous::Rendezvous(const Processes& processes, const GpuId& gpu, const std::string& host)
    : processes_(processes) {
  std::random_device random;
  CopyText(host, own_.host);
  std::snprintf(own_.memory, sizeof(own_.memory), "/jax_sm_free.%08x%08x", random(), random());
  own_.gpu = gpu;
}

Result<std::vector<std::string>> Rendezvous::Meet(const std::string& words) {
  const std::string hello(reinterpret_cast<const char*>(&own_), sizeof(Hello));
  std::vector<std::string> words_of_all;
  for (const std::string& heard : processes_.exchange(hello + words)) {
    if (heard.size() < sizeof(Hello)) {
      return Refuse("a greeting of at least " + std::to_string(sizeof(Hello)) + " bytes",
                    std::to_string(heard.size()));
    }
    std::memcpy(&hellos_.emplace_back(), heard.data(), sizeof(Hello));
    words_of_all.push_back(heard.substr(sizeof(Hello)));
  }
  for (int32_t i = 0; i < num_processes(); ++i) {
    for (int32_t j = 0; j < i; ++j) {
      if (hellos_[i].gpu == hellos_[j].gpu && !MayShareGpus()) return SameGpu(j, i);
    }
  }
  return words_of_all;
}

bool Rendezvous::OnThisHost(int32_t process) const {
  return std::memcmp(hellos_[process].host, own_.host, sizeof(own_.host)) == 0;
}

int32_t Rendezvous::HostLeader(const std::vector<int32_t>& candidates) const {
  return *std::find_if(candidates.begin(), candidates.end(),
                       [this](int32_t process) { return OnThisHost(process); });
}

}  // namespace jax_sm_free::cuda
