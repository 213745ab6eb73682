// Takes the exchange that a token names, and waits: for the notices of its messages, and for the
// messages themselves where nothing can be done before all of them are there. It has one block, so
// that a wait occupies at most one SM. It gives up after the timeout.

#include <cuda_runtime.h>

#include "cc/cuda/kernels/await.cuh"
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
  if (slot < 0 || slot >= view.config.num_slots || state->slot_sequence[slot] != sequence ||
      state->slot_phase[slot] != kSent) {
    state->current = {sequence, slot, kNothing, 0};
    Raise(view, args.op, {FaultCode::kTokenUsed, -1, 0, static_cast<int64_t>(sequence)});
    return;
  }
  state->slot_phase[slot] = kReceiving;
  state->current = {sequence, slot, kOk, 0};
}

__device__ void Refuse(const RankView& view, const WaitArgs& args, const FaultNumbers& fault) {
  Raise(view, args.op, fault);
  view.state->current.failed = kEmpty;
}

// Waits for the notice of one source.
__device__ void AwaitNotice(const RankView& view, const WaitArgs& args, int32_t source) {
  const Current current = view.state->current;
  const auto has_come = [&](int32_t from) {
    return LoadAcquire(Noticed(view, view.rank, current.slot, from)) >= current.sequence;
  };
  if (!Await(view, args.op, source, has_come)) return;
  const MessageHeader& header = HeaderOf(Notice(view, view.rank, current.slot, source));
  const auto kind = static_cast<int32_t>(KindOf(args.op));
  if (header.kind == kPoisonedKind) return Refuse(view, args, {FaultCode::kPeer, source});
  if (header.kind == kind) return;
  Refuse(view, args, {FaultCode::kMessageKind, source, kind, header.kind});
}

// Reads the notice of a source, and checks what it says.
__device__ void ReadNotice(const RankView& view, const WaitArgs& args, int32_t source) {
  DeviceState* state = view.state;
  const std::byte* notice = Notice(view, view.rank, state->current.slot, source);
  const MessageHeader& header = HeaderOf(notice);
  const int32_t num_rows =
      args.expected_rows != nullptr ? args.expected_rows[source] : header.num_rows;
  if (source == view.rank && args.own_tokens && header.num_tokens != *args.own_tokens) {
    return Refuse(view, args,
                  {FaultCode::kOutOfStep, source, args.row_bytes, header.row_bytes,
                   *args.own_tokens << 32 | header.num_tokens});
  }
  if (header.row_bytes != args.row_bytes || header.num_rows != num_rows) {
    return Refuse(view, args,
                  {FaultCode::kOutOfStep, source, args.row_bytes, header.row_bytes,
                   int64_t{num_rows} << 32 | header.num_rows});
  }
  state->num_rows[source] = header.num_rows;
  state->first_part[source] = static_cast<int32_t>(header.first_part);
  CountRows(state->counters.bytes_received[source], header);
}

// Runs at the same time as the kernels before it, which find the routing again.
__global__ void WaitKernel(const RankView view, const WaitArgs args) {
  DeviceState* state = view.state;
  ResetClaims(state);
  if (threadIdx.x == 0) Take(view, args);
  __syncthreads();
  const bool taken = state->current.failed != kNothing;
  for (int32_t source = threadIdx.x; taken && source < view.config.ep_size; source += blockDim.x) {
    state->num_rows[source] = 0;
    state->first_part[source] = 0;
    AwaitNotice(view, args, source);
  }
  __syncthreads();
  if (args.for_messages && state->current.failed == kOk) {
    AwaitMessages(view, args.op, {0, view.config.ep_size, kLastPart});
  }
  AwaitPrevious();
  AdmitNext();
  if (!taken) return;
  __syncthreads();
  const bool ok = state->current.failed == kOk;
  __syncthreads();
  for (int32_t source = threadIdx.x; ok && source < view.config.ep_size; source += blockDim.x) {
    ReadNotice(view, args, source);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (state->current.failed == kOk) {
    atomicAdd(&state->counters.exchanges[static_cast<int>(KindOf(args.op))], 1ULL);
  }
  int32_t next = 0;
  for (int32_t source = 0; source < view.config.ep_size; ++source) {
    state->first_row[source] = next;
    next += state->num_rows[source];
  }
  state->first_row[view.config.ep_size] = next;
}

}  // namespace

void LaunchWait(const RankView& view, const WaitArgs& args, cudaStream_t stream) {
  const Grid grid{1, kMaxRanks};
  args.is_first ? Enqueue(WaitKernel, grid, stream, view, args)
                : EnqueueBehind(WaitKernel, grid, stream, view, args);
}

cudaError_t LoadWait() { return Load(WaitKernel); }

}  // namespace jax_sm_free::cuda
