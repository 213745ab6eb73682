// The launchers of all kernels. Each enqueues on `stream` and returns; none blocks or allocates.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_KERNELS_H_
#define JAX_SM_FREE_CC_CUDA_KERNELS_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>

#include "cc/cuda/rank_view.h"
#include "cc/op.h"
#include "cc/operands.h"

namespace jax_sm_free::cuda {

// What a send begins: the next exchange. The send writes the token of this exchange.
struct BeginArgs {
  float* token = nullptr;  // [kTokenSize]
  // i32 []: the position that the program expects of this rank. Null if it is not checked.
  const int32_t* position = nullptr;
};

// route.cu

// Finds the row of every token in the message to each rank, and writes it into scratch. In a send,
// it also begins the exchange, and writes the headers and notices of all messages. In a dispatch,
// it also writes the routing of the rows.
struct RouteArgs {
  Op op = Op::kDispatchSend;
  int64_t row_bytes = 0;
  TopK topk = {};                       // a dispatch has weights
  std::optional<BeginArgs> begin = {};  // a send has it; a recv only finds the routing again
};
void LaunchRoute(const RankView& view, const RouteArgs& args, cudaStream_t stream);

// pack.cu

// Writes token rows into messages, and posts the messages part by part. pack_quantized.cu has the
// kernel for rows that the wire quantises.
struct PackArgs {
  ConstRows rows;
  int64_t num_tokens = 0;
  // Only for plain rows: the recv reads this rank's own rows from the program's array.
  bool leaves_own = false;
  RowFormat format = {};
};
void LaunchPack(const RankView& view, const PackArgs& args, cudaStream_t stream);

// wait.cu

// Takes the exchange that the token names, and waits for the notices of its messages. If
// `for_messages` is set, it also waits for the messages. One block.
enum class Awaited : int32_t {
  kSources,  // recv of rows: a message of each rank
  kLanes,    // recv of sums: the messages of MessageTable::of_lane
  // In two tiers.
  kRail,    // forward of rows: rail messages
  kOthers,  // forward of sums: what the own node has for each of the other nodes
};
struct WaitArgs {
  Op op = Op::kDispatchRecv;
  Awaited awaited = Awaited::kSources;
  const float* token = nullptr;            // [kTokenSize]
  float* token_out = nullptr;              // [kTokenSize]: of a forward
  int64_t row_bytes = 0;                   // 0: as many as the send of this rank has sent
  const int32_t* expected_rows = nullptr;  // rows that each message must have, in order
  std::optional<int64_t> own_tokens = {};  // the number of tokens that this rank gave to the send
  bool for_messages = true;
  bool is_first = true;  // whether no other kernel of the call was launched before
};
void LaunchWait(const RankView& view, const WaitArgs& args, cudaStream_t stream);

// unpack_experts.cu and unpack_tokens.cu. unpack_dequantized.cu has the kernels for rows that the
// wire quantised.

struct UnpackExpertsArgs : ExpertsOut {
  // [tokens]: the rows that this rank gave to the send. Null if the send packed them.
  ConstRows own_rows = {};
  bool all_here = false;  // LaunchWait has waited for the messages, and not only for notices
};
// Places the groups for LaunchUnpackExperts. One block.
void LaunchPlan(const RankView& view, const UnpackExpertsArgs& out, cudaStream_t stream);

// Writes this rank's own rows first, and then the rows of others as they arrive. While the last
// rows are in flight, it writes the others.
void LaunchUnpackExperts(const RankView& view, const UnpackExpertsArgs& out, cudaStream_t stream);

struct UnpackTokensArgs : TokensOut {
  ConstRows own_rows = {};  // as in UnpackExpertsArgs
};
void LaunchUnpackTokens(const RankView& view, const UnpackTokensArgs& out, cudaStream_t stream);

// pack_sums.cu

// Begins an exchange, sums expert rows into the messages, and posts them. PackSums in
// cc/cpu/reduce.h computes the same.
struct PackSumsArgs : SumsIn {
  Op op = Op::kCombineSend;
  BeginArgs begin = {};
  bool leaves_own = false;  // the recv sums this rank's own rows
};
void LaunchPackSums(const RankView& view, const PackSumsArgs& args, cudaStream_t stream);

// sum.cu

// Sums over ranks. SumOverRanks in cc/cpu/reduce.h computes the same.
struct SumArgs : SumsOut {
  Op op = Op::kCombineRecv;
  // The expert rows of the send, if it left the sums for this rank to the recv.
  std::optional<ExpertRows> own = {};
};
void LaunchSum(const RankView& view, const SumArgs& args, cudaStream_t stream);

// spread.cu

// Writes the gradients of expert rows from those of token rows. SpreadGradients in cc/cpu/reduce.h
// computes the same.
struct SpreadArgs : SpreadOut {
  Op op = Op::kCombineBackwardRecv;
};
void LaunchSpread(const RankView& view, const SpreadArgs& args, cudaStream_t stream);

// forward_route.cu

// Finds the row of every row of a rail message in the message from the same source to each rank of
// this node, and writes it into scratch: i32 [num_nodes * max_tokens, node_size]. In a dispatch, it
// also writes the routing of the rows into these messages.
struct ForwardRouteArgs {
  Op op = Op::kDispatchForward;
  // i32 [num_nodes * max_tokens, top_k] (cc/operands.h): written in a dispatch, else read.
  int32_t* node_topk_out = nullptr;
  const int32_t* node_topk = nullptr;
  bool is_first = true;  // whether no other kernel of the call was launched before
};
void LaunchForwardRoute(const RankView& view, const ForwardRouteArgs& args, cudaStream_t stream);

// forward_rows.cu

// Writes the rows of rail messages into the messages of their sources to the ranks of this node,
// and posts these.
void LaunchForwardRows(const RankView& view, Op op, cudaStream_t stream);

// forward_sums.cu

// Sums the messages that this node has for each rail peer into one rail message, and posts these.
struct ForwardSumsArgs {
  Op op = Op::kCombineForward;
  const int32_t* node_topk = nullptr;
};
void LaunchForwardSums(const RankView& view, const ForwardSumsArgs& args, cudaStream_t stream);

// Each function loads the kernels of one file on the current device. A kernel that is loaded while
// another kernel waits may deadlock.
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
cudaError_t LoadForwardRoute();
cudaError_t LoadForwardRows();
cudaError_t LoadForwardSums();

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_KERNELS_H_
