// The ops of cc/cuda/ops.h for all ranks of a group: first all sends, then the movers, then all
// forwards and the movers again, then all recvs. Rows are float32. Numbers are small and whole, so
// that sums are exact in any order.

#ifndef JAX_SM_FREE_CC_CUDA_KERNEL_TESTS_OPS_H_
#define JAX_SM_FREE_CC_CUDA_KERNEL_TESTS_OPS_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <random>
#include <vector>

#include "cc/config.h"
#include "cc/cuda/kernel_tests/group.h"
#include "cc/cuda/kernel_tests/memory.h"
#include "cc/cuda/ops.h"
#include "cc/op.h"
#include "cc/operands.h"

namespace jax_sm_free::cuda::kernel_tests {

// How tokens choose their experts.
enum class Routing { kAnywhere, kEverywhere, kNearlyEverywhere, kToFirstRank, kNowhere };

struct Case {
  int32_t ep_size;
  int32_t num_tokens;
  int32_t hidden;
  Routing routing = Routing::kAnywhere;
  int64_t recv_capacity = -1;  // -1: room for all that tokens can name
  bool held_up = false;        // the driver holds up all copies
  WireFormat wire_format = WireFormat::kPlain;
  double timeout_s = 5;
  int32_t num_nodes = 1;
  int32_t node_stride = 1;
  DType dtype = DType::kFloat32;  // of the configuration; the functions of Ops take float32
};

inline constexpr int32_t kLocalExperts = 3;
inline constexpr int32_t kTopK = 4;

using Floats = Array<float>;
using Ints = Array<int32_t>;

// What one rank gives to a dispatch, and what it gets from it.
struct Arrays {
  Floats x;        // [T, hidden]
  Ints idx;        // [T, top_k]
  Floats weights;  // [T, top_k]
  Floats token;    // [kTokenSize]
  int32_t position = 0;

  Floats rows;         // [recv_capacity, hidden]
  Floats row_weights;  // [recv_capacity]
  Ints group_sizes;    // [local experts]
  Ints counts;         // [local experts]
  int32_t dropped = -1;
  Ints layout_rows;    // [max_recv_tokens, top_k]
  Ints num_rows_from;  // [ep_size]
  Ints node_topk;      // [num_nodes * max_tokens, top_k], in two tiers
};

// What one rank gets from a dispatch by tokens.
struct TokenArrays {
  Floats rows;          // [max_recv_tokens, hidden]
  Ints topk_idx;        // [max_recv_tokens, top_k]
  Floats topk_weights;  // [max_recv_tokens, top_k]
  Ints counts;          // [local experts]
  int32_t num_tokens = -1;
  Ints layout_rows;    // [max_recv_tokens]
  Ints num_rows_from;  // [ep_size]
};

class Ops {
 public:
  explicit Ops(const Case& which);

  Group& group() { return group_; }
  Arrays& of(int32_t rank) { return arrays_[rank]; }
  const Config& config() const { return config_; }
  Matrix matrix() const { return {DType::kFloat32, case_.hidden}; }

  // Random numbers for rows or weights.
  Floats Numbers(int64_t count);

  // Dispatches x of all ranks. The rows go into their arrays, or into the result, by rank.
  void Dispatch();
  Array<TokenArrays> DispatchByTokens();
  // A dispatch in which one rank does not take part.
  void DispatchWithout(int32_t silent);
  // The steps of a dispatch. All of these are of one rank.
  void SendDispatch(int32_t rank);
  void ForwardDispatch(int32_t rank);
  void RecvDispatch(int32_t rank);
  // What the movers do between two steps.
  void Move();
  // The forwards of all ranks, and what the movers do then. Nothing in one tier.
  void ForwardAll(Op op);

  LayoutIn LayoutOf(int32_t rank) const;
  DeviceCall CallOf(Op op, int32_t rank) const;

  // The following functions take and return values by rank.

  // y [recv_capacity, hidden], weighted or not, becomes sums [T, hidden].
  std::vector<Floats> Combine(const std::vector<Floats>& y, bool weighted);
  // The gradient of a dispatch: y and row_grads [max_recv_tokens, top_k] become sums [T, hidden]
  // and weight_grads [T, top_k].
  std::vector<Floats> DispatchBackward(const std::vector<Floats>& y,
                                       const std::vector<Floats>& row_grads,
                                       std::vector<Floats>& weight_grads);
  // The gradient of a weighted combine of y: grads [T, hidden] become y_grads [recv_capacity,
  // hidden] and weight_grads [recv_capacity].
  std::vector<Floats> CombineBackward(const std::vector<Floats>& grads,
                                      const std::vector<Floats>& y,
                                      std::vector<Floats>& weight_grads);

 private:
  int32_t ExpertAnywhere();  // or -1
  int32_t ExpertFor(int32_t token, int32_t k);
  Arrays MakeArrays(int32_t rank);
  int64_t row_bytes() const { return matrix().row_bytes(); }
  RowFormat format() const { return {case_.wire_format, matrix()}; }
  OwnRows OwnOf(int32_t rank) const;
  Floats SumsOf(Op op, int32_t rank, const std::optional<ExpertRows>& own, float* weight_grads);

  const Case case_;
  const Config config_;
  Group group_;
  std::mt19937 random_{1};
  Array<Arrays> arrays_;
};

}  // namespace jax_sm_free::cuda::kernel_tests

#endif  // JAX_SM_FREE_CC_CUDA_KERNEL_TESTS_OPS_H_
