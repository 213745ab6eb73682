// Takes the exchange that a token names, and waits: for the notices of its messages, and for the
// messages themselves where nothing can be done before all of them are there. It has one block, so
// that a wait occupies at most one SM. It gives up after the timeout.

#include <cuda_runtime.h>

#include "cc/cuda/kernels/await.cuh"
#include "cc/cuda/kernels/begin.cuh"
#include "cc/cuda/kernels/claims.cuh"
#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/kernels.h"
#include "cc/cuda/kernels/launch.h"

namespace jax_sm_free::cuda {
namespace {

// Sets state->current from the token. One thread calls this.
__device__ void Take(const RankView& view, const WaitArgs& args) {
  DeviceState* state = view.state;
  state->current = {0, 0, kNothing, 0};
  if (!IsToken(args.token)) {
    Raise(view, args.op, {FaultCode::kToken, -1, 0, __float_as_int(args.token[kMagicWord])});
    return;
  }
  const Token token = ReadToken(args.token);
  if (token.rank != view.rank || token.buffer != TokenBuffer(view.buffer_id)) {
    Raise(view, args.op, {FaultCode::kTokenOrigin, -1, 0, token.rank, token.buffer});
    return;
  }
  const auto kind = static_cast<int64_t>(KindOf(args.op));
  if (token.kind != kind) {
    Raise(view, args.op, {FaultCode::kTokenKind, -1, kind, token.kind});
    return;
  }
  const auto sequence = static_cast<uint64_t>(token.sequence);
  const auto slot = static_cast<int32_t>(token.slot);
  const bool forwards = IsForward(args.op);
  const SlotPhase before = view.config.num_nodes == 1 || forwards ? kSent : kForwarded;
  const bool is_open =
      slot >= 0 && slot < view.config.num_slots && state->slot_sequence[slot] == sequence;
  if (!is_open || state->slot_phase[slot] != before) {
    state->current = {sequence, slot, kNothing, 0};
    const bool is_early = is_open && state->slot_phase[slot] == kSent;
    Raise(view, args.op,
          {is_early ? FaultCode::kNotForwarded : FaultCode::kTokenUsed, -1, 0, token.sequence});
    return;
  }
  state->slot_phase[slot] = forwards ? kForwarded : kReceiving;
  state->current = {sequence, slot, kOk, 0};
}

__device__ void Refuse(const RankView& view, const WaitArgs& args, const FaultNumbers& fault) {
  Raise(view, args.op, fault);
  view.state->current.failed = kEmpty;
}

// Waits for the notice of a message.
__device__ void AwaitNotice(const RankView& view, const WaitArgs& args, int32_t message) {
  const Current current = view.state->current;
  const auto has_come = [&](int32_t from) {
    return LoadAcquire(Noticed(view, view.rank, current.slot, from)) >= current.sequence;
  };
  if (!Await(view, args.op, args.awaited, message, has_come)) return;
  const MessageHeader& header = HeaderOf(Notice(view, view.rank, current.slot, message));
  const int32_t source = BlamedRank(view, args.awaited, message);
  const auto kind = static_cast<int32_t>(KindOf(args.op));
  if (header.kind == kPoisonedKind) return Refuse(view, args, {FaultCode::kPeer, source});
  if (header.kind == kind) return;
  Refuse(view, args, {FaultCode::kMessageKind, source, kind, header.kind});
}

// Reads the notice of the i-th message, and checks what it says.
__device__ void ReadNotice(const RankView& view, const WaitArgs& args, int32_t i) {
  DeviceState* state = view.state;
  const int32_t slot = state->current.slot;
  const int32_t message = AwaitedMessage(view, args.awaited, i);
  const int32_t source = BlamedRank(view, args.awaited, message);
  const MessageHeader& header = HeaderOf(Notice(view, view.rank, slot, message));
  const int32_t num_rows = args.expected_rows != nullptr ? args.expected_rows[i] : header.num_rows;
  const int64_t row_bytes =
      args.row_bytes != 0 ? args.row_bytes : HeaderOf(InMessage(view, slot, view.rank)).row_bytes;
  if (message == view.rank && args.own_tokens && header.num_tokens != *args.own_tokens) {
    return Refuse(view, args,
                  {FaultCode::kOutOfStep, source, row_bytes, header.row_bytes,
                   *args.own_tokens << 32 | header.num_tokens});
  }
  if (header.row_bytes != row_bytes || header.num_rows != num_rows) {
    return Refuse(view, args,
                  {FaultCode::kOutOfStep, source, row_bytes, header.row_bytes,
                   int64_t{num_rows} << 32 | header.num_rows});
  }
  state->num_rows[i] = header.num_rows;
  state->first_part[i] = static_cast<int32_t>(header.first_part);
  CountRows(state->counters.bytes_received[EndOf(view, message).rank], header);
}

// Runs at the same time as the kernels before it, which find the routing again.
__global__ void WaitKernel(const RankView view, const WaitArgs args) {
  DeviceState* state = view.state;
  ResetClaims(state);
  if (threadIdx.x == 0) {
    Take(view, args);
    if (args.token_out != nullptr) WriteTokenOf(view, args.op, args.token_out);
  }
  __syncthreads();
  const bool taken = state->current.failed != kNothing;
  const int32_t count = NumAwaited(view, args.awaited);
  const auto message_at = [&](int32_t i) { return AwaitedMessage(view, args.awaited, i); };
  for (int32_t i = threadIdx.x; taken && i < count; i += blockDim.x) {
    state->num_rows[i] = 0;
    state->first_part[i] = 0;
    AwaitNotice(view, args, message_at(i));
  }
  __syncthreads();
  if (args.for_messages && state->current.failed == kOk) {
    AwaitMessages(view, args.op, args.awaited, kLastPart, count, message_at);
  }
  AwaitPrevious();
  AdmitNext();
  if (!taken) return;
  __syncthreads();
  // What a rank with a fault sends is poisoned. So is what it forwards.
  if (threadIdx.x == 0 && IsForward(args.op) && state->faulted != kSound) {
    state->current.failed = kEmpty;
  }
  __syncthreads();
  const bool ok = state->current.failed == kOk;
  __syncthreads();
  for (int32_t i = threadIdx.x; ok && i < count; i += blockDim.x) ReadNotice(view, args, i);
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (state->current.failed == kOk && !IsForward(args.op)) {
    atomicAdd(&state->counters.exchanges[static_cast<int>(KindOf(args.op))], 1ULL);
  }
  int32_t next = 0;
  for (int32_t i = 0; i < count; ++i) {
    state->first_row[i] = next;
    next += state->num_rows[i];
  }
  state->first_row[count] = next;
}

}  // namespace

void LaunchWait(const RankView& view, const WaitArgs& args, cudaStream_t stream) {
  const Grid grid{1, kMaxRanks};
  args.is_first ? Enqueue(WaitKernel, grid, stream, view, args)
                : EnqueueBehind(WaitKernel, grid, stream, view, args);
}

cudaError_t LoadWait() { return Load(WaitKernel); }

}  // namespace jax_sm_free::cuda
