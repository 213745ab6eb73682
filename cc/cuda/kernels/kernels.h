// The launchers of all kernels. Each enqueues on `stream` and returns; none blocks or allocates.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_KERNELS_H_
#define JAX_SM_FREE_CC_CUDA_KERNELS_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>

#include "cc/cuda/device_state.h"
#include "cc/operands.h"

namespace jax_sm_free::cuda {

// What a send begins: the next exchange, and its token.
struct BeginArgs {
  Op op;
  Kind kind;
  const int32_t* position_of_program;  // i32 [], or null where it is not checked
  float* token;                        // [kTokenSize]; null where nothing begins: in a recv
};

// route.cu

// The row of every token in the message to each rank, into scratch. In a send, which it begins, the
// headers and notices of all messages too; with weights, also their routing.
struct RouteArgs {
  BeginArgs begin;
  int64_t row_bytes;
  const int32_t* topk_idx;    // [num_tokens, top_k]
  const float* topk_weights;  // null unless a dispatch begins
  int64_t num_tokens;
};
void LaunchRoute(const RankView& view, const RouteArgs& args, cudaStream_t stream);

// pack.cu

// Token rows into messages, and posts them part by part.
struct PackArgs {
  ConstRows rows;
  int64_t num_tokens;
  bool leaves_own;  // the recv reads our own rows where they are
};
void LaunchPack(const RankView& view, const PackArgs& args, cudaStream_t stream);

// pack_quantized.cu

// The same, for rows that travel as float8 with scales.
struct PackQuantizedArgs {
  Matrix matrix;
  const std::byte* x;  // [num_tokens]
  int64_t num_tokens;
};
void LaunchPackQuantized(const RankView& view, const PackQuantizedArgs& args, cudaStream_t stream);

// wait.cu

// Takes the exchange that the token names and waits for the notices of its messages, and for the
// messages if told so. One block.
struct WaitArgs {
  Op op;
  Kind kind;
  int64_t row_bytes;
  const int32_t* expected_rows;  // [ep_size], rows that each source must have sent; null for any
  const float* token;            // [kTokenSize]
  bool for_messages;
  bool is_first;       // of its call: no other kernel is launched before it
  int64_t num_tokens;  // rows that this rank must have sent from; -1 for any number
};
void LaunchWait(const RankView& view, const WaitArgs& args, cudaStream_t stream);

// unpack_experts.cu

// Of both: `own_rows` is the array that this rank sent from, [tokens]; null where its own rows were
// packed, too.
struct ExpertsOut {
  ConstRows own_rows;
  MutableRows rows;        // [recv_capacity]
  int32_t* group_sizes;    // [num_local_experts]
  int32_t* counts;         // [num_local_experts]
  float* weights;          // [recv_capacity]
  int32_t* dropped;        // []
  int32_t* layout_rows;    // [max_recv_tokens, top_k]
  int32_t* num_rows_from;  // [ep_size]
  bool all_here;           // LaunchWait has waited for the messages, not for notices alone
};
// Places the groups, for LaunchUnpackExperts. One block.
void LaunchPlan(const RankView& view, const ExpertsOut& out, cudaStream_t stream);

// Our own rows first; others as they come in: while the last ones are on their way, the rest is
// written.
void LaunchUnpackExperts(const RankView& view, const ExpertsOut& out, cudaStream_t stream);

// unpack_tokens.cu

struct TokensOut {
  ConstRows own_rows;
  MutableRows rows;        // [max_recv_tokens]
  int32_t* topk_idx;       // [max_recv_tokens, top_k]
  float* topk_weights;     // [max_recv_tokens, top_k]
  int32_t* counts;         // [num_local_experts]
  int32_t* num_tokens;     // []
  int32_t* layout_rows;    // [max_recv_tokens]
  int32_t* num_rows_from;  // [ep_size]
};
void LaunchUnpackTokens(const RankView& view, const TokensOut& out, cudaStream_t stream);

// unpack_dequantized.cu

// Both of them for rows that came as float8 with scales: back to what `matrix` says.
void LaunchUnpackExpertsDequantized(const RankView& view, const ExpertsOut& out,
                                    const Matrix& matrix, cudaStream_t stream);
void LaunchUnpackTokensDequantized(const RankView& view, const TokensOut& out, const Matrix& matrix,
                                   cudaStream_t stream);

// pack_sums.cu

// Rows of experts, to be summed by token.
struct ExpertRows {
  const std::byte* y;
  const float* weights;  // null for a plain sum
  LayoutIn layout;
};

// Sums of expert rows into messages, then posts them: PackSums of cc/cpu/reduce.h.
struct PackSumsArgs {
  BeginArgs begin;
  Matrix matrix;
  ExpertRows rows;
  const float* weight_grads;  // null unless kind is kDispatchBackward
  bool leaves_own;            // the recv sums our own rows
};
void LaunchPackSums(const RankView& view, const PackSumsArgs& args, cudaStream_t stream);

// sum.cu

// Sums over ranks into out, as SumOverRanks of cc/cpu/reduce.h.
struct SumArgs {
  Op op;
  Matrix matrix;
  const int32_t* topk_idx;
  int64_t num_tokens;
  std::byte* out;
  float* weight_grads;            // null in the forward pass
  std::optional<ExpertRows> own;  // what the send had, if it left our own rows
};
void LaunchSum(const RankView& view, const SumArgs& args, cudaStream_t stream);

// spread.cu

// Gradients of token rows to expert rows, as SpreadGradients of cc/cpu/reduce.h.
struct SpreadArgs {
  Op op;
  Matrix matrix;
  LayoutIn layout;
  const std::byte* y;
  const float* weights;  // null for a plain sum
  std::byte* y_grad;
  float* weight_grads;
};
void LaunchSpread(const RankView& view, const SpreadArgs& args, cudaStream_t stream);

// Each loads the kernels of its file on the current device: a kernel that is loaded behind one that
// waits may deadlock.
cudaError_t LoadRoute();
cudaError_t LoadPack();
cudaError_t LoadPackQuantized();
cudaError_t LoadWait();
cudaError_t LoadPlan();
cudaError_t LoadUnpackExperts();
cudaError_t LoadUnpackTokens();
cudaError_t LoadUnpackDequantized();
cudaError_t LoadPackSums();
cudaError_t LoadSum();
cudaError_t LoadSpread();

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_KERNELS_H_
