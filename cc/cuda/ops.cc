#include "cc/cuda/ops.h"

#include <cstdint>

#include "cc/cuda/kernels/kernels.h"

namespace jax_sm_free::cuda {
namespace {

void EndPhase(const DeviceCall& call, const char* phase) {
  if (call.on_phase != nullptr) (*call.on_phase)(phase);
}

// Takes the dispatch that the token names, and waits for its rows, which `out` will hold. If the
// wire quantises rows, the send has packed this rank's own rows, too.
template <typename Out>
void WaitForRows(const DeviceCall& call, const float* token, const OwnRows& own, const Out& out,
                 bool for_messages) {
  WaitArgs args{.op = call.op,
                .token = token,
                .row_bytes = out.format.WireBytes(out.rows.row_bytes()),
                .for_messages = for_messages};
  if (out.format.is_plain()) args.own_tokens = own.num_tokens;
  LaunchWait(*call.view, args, call.stream);
  EndPhase(call, "wait");
}

}  // namespace

void DispatchSend(const DeviceCall& call, const DispatchSendIn& in, float* token) {
  LaunchRoute(*call.view,
              {.op = call.op,
               .row_bytes = in.format.WireBytes(in.rows.row_bytes()),
               .topk = in.topk,
               .begin = BeginArgs{.token = token, .position = in.position}},
              call.stream);
  EndPhase(call, "route");
  LaunchPack(*call.view,
             {.rows = in.rows,
              .num_tokens = in.topk.num_tokens,
              .leaves_own = in.format.is_plain(),
              .format = in.format},
             call.stream);
  EndPhase(call, "pack");
}

void CombineBackwardSend(const DeviceCall& call, const RowsIn& in, float* token) {
  LaunchRoute(*call.view,
              {.op = call.op,
               .row_bytes = in.rows.row_bytes(),
               .topk = in.topk,
               .begin = BeginArgs{.token = token}},
              call.stream);
  EndPhase(call, "route");
  LaunchPack(*call.view, {.rows = in.rows, .num_tokens = in.topk.num_tokens}, call.stream);
  EndPhase(call, "pack");
}

void SendSums(const DeviceCall& call, const SumsIn& in, float* token) {
  PackSumsArgs args{in};
  args.op = call.op;
  args.begin.token = token;
  // In two tiers, a recv sums the ranks of its node in place order, and its own rows are one of
  // them.
  args.leaves_own = call.op == Op::kCombineSend && !call.config().has_two_tiers();
  LaunchPackSums(*call.view, args, call.stream);
  EndPhase(call, "reduce-pack");
}

void DispatchForward(const DeviceCall& call, const float* token, const ForwardOut& out) {
  LaunchWait(*call.view,
             {.op = call.op, .awaited = Awaited::kRail, .token = token, .token_out = out.token},
             call.stream);
  LaunchForwardRoute(*call.view, {.op = call.op, .node_topk_out = out.node_topk, .is_first = false},
                     call.stream);
  EndPhase(call, "wait + route rail");
  LaunchForwardRows(*call.view, call.op, call.stream);
  EndPhase(call, "forward rows");
}

void CombineBackwardForward(const DeviceCall& call, const float* token, const ForwardIn& in,
                            float* token_out) {
  LaunchForwardRoute(*call.view, {.op = call.op, .node_topk = in.node_topk}, call.stream);
  LaunchWait(*call.view,
             {.op = call.op,
              .awaited = Awaited::kRail,
              .token = token,
              .token_out = token_out,
              .expected_rows = call.view->state->rail_rows,
              .is_first = false},
             call.stream);
  EndPhase(call, "route rail + wait");
  LaunchForwardRows(*call.view, call.op, call.stream);
  EndPhase(call, "forward rows");
}

void ForwardSums(const DeviceCall& call, const float* token, const ForwardIn& in,
                 float* token_out) {
  LaunchForwardRoute(*call.view, {.op = call.op, .node_topk = in.node_topk}, call.stream);
  LaunchWait(*call.view,
             {.op = call.op,
              .awaited = Awaited::kOthers,
              .token = token,
              .token_out = token_out,
              .expected_rows = call.view->state->routed_rows,
              .is_first = false},
             call.stream);
  EndPhase(call, "route rail + wait");
  LaunchForwardSums(*call.view, {.op = call.op, .node_topk = in.node_topk}, call.stream);
  EndPhase(call, "forward sums");
}

void DispatchRecv(const DeviceCall& call, const float* token, const OwnRows& own,
                  const ExpertsOut& out) {
  UnpackExpertsArgs args{out};
  if (out.format.is_plain()) args.own_rows = own.rows;
  args.all_here = !GoInParts(call.config().max_tokens, out.format.WireBytes(out.rows.row_bytes()));
  WaitForRows(call, token, own, out, args.all_here);
  LaunchUnpackExperts(*call.view, args, call.stream);
  EndPhase(call, "plan + unpack");
}

void DispatchRecvTokens(const DeviceCall& call, const float* token, const OwnRows& own,
                        const TokensOut& out) {
  UnpackTokensArgs args{out};
  if (out.format.is_plain()) args.own_rows = own.rows;
  WaitForRows(call, token, own, out, true);
  LaunchUnpackTokens(*call.view, args, call.stream);
  EndPhase(call, "unpack");
}

void ReceiveSums(const DeviceCall& call, const float* token, const std::optional<ExpertRows>& own,
                 const SumsOut& out) {
  const int64_t row_bytes = out.matrix.row_bytes();
  // Finds the routing again while messages are still in flight.
  LaunchRoute(*call.view, {.op = call.op, .row_bytes = row_bytes, .topk = out.topk}, call.stream);
  LaunchWait(*call.view,
             {.op = call.op,
              .awaited = Awaited::kLanes,
              .token = token,
              .row_bytes = row_bytes,
              .expected_rows = call.view->state->routed_rows,
              .is_first = false},
             call.stream);
  EndPhase(call, "route + wait");
  SumArgs args{out};
  args.op = call.op;
  if (!call.config().has_two_tiers()) args.own = own;
  LaunchSum(*call.view, args, call.stream);
  EndPhase(call, "sum");
}

void CombineBackwardRecv(const DeviceCall& call, const float* token, const SpreadOut& out) {
  LaunchWait(*call.view,
             {.op = call.op,
              .token = token,
              .row_bytes = out.matrix.row_bytes(),
              .expected_rows = out.rows.layout.num_rows_from},
             call.stream);
  EndPhase(call, "wait");
  SpreadArgs args{out};
  args.op = call.op;
  LaunchSpread(*call.view, args, call.stream);
  EndPhase(call, "spread");
}

}  // namespace jax_sm_free::cuda
