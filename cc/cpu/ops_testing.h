// What the tests of ops share: a buffer whose ranks are threads, and a layer as one rank sees it.

#ifndef JAX_SM_FREE_CC_CPU_OPS_TESTING_H_
#define JAX_SM_FREE_CC_CPU_OPS_TESTING_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cc/cpu/ops.h"
#include "cc/cpu/testing.h"

namespace jax_sm_free::testing {

using Token = std::array<float, kTokenSize>;

inline constexpr Matrix kMatrix{.dtype = DType::kBFloat16, .hidden = 6};

Config ConfigFor(int32_t ep_size);

// Device i is rank i.
std::shared_ptr<HostBuffer> BufferOf(const Config& config);

HostCall CallOf(Op op, const std::shared_ptr<HostBuffer>& buffer, int32_t rank, int64_t run);

// Calls `recv` with `call`, and returns what it ends with.
std::optional<Fault> Awaited(HostCall call, const std::function<void(const HostCall&)>& recv);

// Calls Receive, and returns what it ends with.
std::optional<Fault> Received(const HostCall& call, const Token& token, Unpack unpack);

std::string Describe(const std::optional<Fault>& fault);  // "" for none

// The sources of a round. They are made from its number, so all threads get the same.
std::vector<Source> SourcesOf(const Config& config, int64_t round);

// What an expert of these tests computes from a value.
float Expert(int32_t expert, float value);

// A layer's results live as long as its exchanges.
class Layer {
 public:
  Layer(std::shared_ptr<HostBuffer> buffer, int32_t rank, int64_t run, int64_t site);

  // The forwards are for buffers of two tiers.
  std::optional<Fault> SendDispatch(const Source& source);
  std::optional<Fault> ForwardDispatch();
  std::optional<Fault> ReceiveDispatch();
  std::optional<Fault> SendCombine();
  std::optional<Fault> ForwardCombine();
  std::optional<Fault> ReceiveCombine(const Source& source, std::vector<std::byte>& out);

  // What ReceiveDispatch has written, to compare it with that of another layer.
  auto dispatched() const {
    return std::tie(values_, group_sizes_, counts_, weights_, dropped_, rows_, num_rows_from_);
  }
  LayoutIn layout() const {
    return {rows_.data(), num_rows_from_.data(), config_.top_k, config_.recv_capacity};
  }
  const std::vector<std::byte>& values() const { return values_; }
  const std::vector<float>& weights() const { return weights_; }
  const std::vector<int32_t>& node_topk() const { return node_topk_; }

 private:
  HostCall Call(Op op) const { return CallOf(op, buffer_, rank_, run_); }
  std::vector<std::byte> RunExperts() const;

  const std::shared_ptr<HostBuffer> buffer_;
  const Config& config_;
  const int32_t rank_;
  const int64_t run_;
  const int64_t site_;
  Token token_{};
  std::vector<std::byte> values_;
  std::vector<int32_t> group_sizes_, counts_;
  std::vector<float> weights_;
  std::vector<int32_t> dropped_;
  std::vector<int32_t> rows_, num_rows_from_;
  std::vector<int32_t> node_topk_;
};

}  // namespace jax_sm_free::testing

#endif  // JAX_SM_FREE_CC_CPU_OPS_TESTING_H_
