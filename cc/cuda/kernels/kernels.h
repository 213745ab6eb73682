// The launchers of all kernels. Each enqueues on `stream` and returns; none blocks or allocates.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_KERNELS_H_
#define JAX_SM_FREE_CC_CUDA_KERNELS_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>

#include "cc/cuda/device_state.h"
#include "cc/op.h"
#include "cc/operands.h"

namespace jax_sm_free::cuda {

// What a send begins: the next exchange, and its token.
struct BeginArgs {
  float* token = nullptr;             // [kTokenSize]
  const int32_t* position = nullptr;  // of the program, i32 []; null where it is not checked
};

// route.cu

// Finds the row of every token in the message to each rank, and leaves it in scratch. A send also
// begins its exchange here, and writes the headers and notices of all messages; a dispatch writes
// the routing of its rows, too.
struct RouteArgs {
  Op op = Op::kDispatchSend;
  int64_t row_bytes = 0;
  TopK topk = {};                       // with weights in a dispatch
  std::optional<BeginArgs> begin = {};  // of a send; a recv finds the routing again
};
void LaunchRoute(const RankView& view, const RouteArgs& args, cudaStream_t stream);

// pack.cu

// Token rows into messages, and posts them part by part. Rows that the wire quantises:
// pack_quantized.cu.
struct PackArgs {
  ConstRows rows;
  int64_t num_tokens = 0;
  bool leaves_own = false;  // the recv reads this rank's own rows where they are; of plain rows
  RowFormat format = {};
};
void LaunchPack(const RankView& view, const PackArgs& args, cudaStream_t stream);

// wait.cu

// Takes the exchange that the token names and waits for the notices of its messages, and for the
// messages if told so. One block.
struct WaitArgs {
  Op op = Op::kDispatchRecv;
  const float* token = nullptr;  // [kTokenSize]
  int64_t row_bytes = 0;
  const int32_t* expected_rows = nullptr;  // [ep_size]: rows that each source must have sent
  std::optional<int64_t> own_tokens = {};  // how many tokens this rank must have sent from
  bool for_messages = true;
  bool is_first = true;  // of its call: no other kernel is launched before it
};
void LaunchWait(const RankView& view, const WaitArgs& args, cudaStream_t stream);

// unpack_experts.cu and unpack_tokens.cu. Rows that the wire quantised: unpack_dequantized.cu.

struct UnpackExpertsArgs : ExpertsOut {
  // [tokens], what this rank sent from; null where its own rows were packed, too.
  ConstRows own_rows = {};
  bool all_here = false;  // LaunchWait has waited for the messages, not for notices alone
};
// Places the groups, for LaunchUnpackExperts. One block.
void LaunchPlan(const RankView& view, const UnpackExpertsArgs& out, cudaStream_t stream);

// Writes this rank's own rows first, and those of others as they come in: while the last rows are
// on their way, the rest is written.
void LaunchUnpackExperts(const RankView& view, const UnpackExpertsArgs& out, cudaStream_t stream);

struct UnpackTokensArgs : TokensOut {
  ConstRows own_rows = {};  // as above
};
void LaunchUnpackTokens(const RankView& view, const UnpackTokensArgs& out, cudaStream_t stream);

// pack_sums.cu

// Begins an exchange, sums expert rows into its messages, and posts them: PackSums of
// cc/cpu/reduce.h.
struct PackSumsArgs : SumsIn {
  Op op = Op::kCombineSend;
  BeginArgs begin = {};
  bool leaves_own = false;  // the recv sums this rank's own rows
};
void LaunchPackSums(const RankView& view, const PackSumsArgs& args, cudaStream_t stream);

// sum.cu

// Sums over ranks, as SumOverRanks of cc/cpu/reduce.h.
struct SumArgs : SumsOut {
  Op op = Op::kCombineRecv;
  std::optional<ExpertRows> own = {};  // what the send had, if it left this rank's own rows
};
void LaunchSum(const RankView& view, const SumArgs& args, cudaStream_t stream);

// spread.cu

// Gradients of token rows to expert rows, as SpreadGradients of cc/cpu/reduce.h.
struct SpreadArgs : SpreadOut {
  Op op = Op::kCombineBackwardRecv;
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
