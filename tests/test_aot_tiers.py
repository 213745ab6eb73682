"""What XLA:GPU makes of two tiers, for two nodes of four H200s, compiled ahead of time."""

from __future__ import annotations

import re
from typing import Any

import aot
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jax_sm_free as smf
from jax_sm_free.reference.rows import sum_by_node

NUM_RANKS, T, H, F, E, TOP_K, NUM_LAYERS = 8, 1024, 1024, 2048, 16, 2, 3
SIZES = {"hidden": H, "num_experts": E, "top_k": TOP_K, "max_tokens": T, "capacity_factor": 1.25}
AXES = ("node", "gpu")
# Where the compute of a layer lies: before or after the forward of a dispatch or of a combine.
PLACES = ("dispatch_before", "dispatch_after", "combine_before", "combine_after")
SPECS = {"router": P(), "up": P(AXES), "down": P(AXES), **dict.fromkeys(PLACES, (P(), P()))}
# Before a forward of the forward pass is after the mirrored forward of the backward pass.
WITHIN = {
    "dispatch_send": ("dispatch_before", "dispatch_after", 2),
    "combine_send": ("combine_before", "combine_after", 2),
    "combine_backward_send": ("combine_after", "combine_before", 4),
    "dispatch_backward_send": ("dispatch_after", "dispatch_before", 4),
}
PARTS = ("send", "forward", "recv")
FORWARD = {f"{op}_{part}": 1 for op in ("dispatch", "combine") for part in PARTS}
BACKWARD = {op.replace("_", "_backward_"): 1 for op in FORWARD}


@pytest.fixture
def buffer() -> smf.Buffer:
    return smf.Buffer(aot.mesh_of_nodes(), AXES, node_axis="node", **SIZES)


def array(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def weights(*leading: int) -> dict[str, Any]:
    mlp = (array(*leading, H, F), array(*leading, F, H))
    experts = {"up": array(*leading, E, H, F), "down": array(*leading, E, F, H)}
    return {"router": array(*leading, H, E), **experts, **dict.fromkeys(PLACES, mlp)}


def layer(buffer: smf.Buffer, w: Any, x: Any, places: Any = PLACES, forwards: bool = True) -> Any:
    """Shared experts on both sides of both forwards."""
    total = x

    def beside(sent: Any, place: str) -> Any:
        nonlocal total

        def mlp(x: Any, up: Any, down: Any) -> Any:
            with jax.named_scope(f"{place}_mlp"):
                return jnp.tanh(x @ up) @ down

        if place not in places:
            return sent
        y, sent = smf.overlap(sent, mlp, x, *w[place])
        total = total + y
        return sent

    scores = jax.nn.softmax((x @ w["router"]).astype(jnp.float32))
    topk_weights, topk_idx = jax.lax.top_k(scores, TOP_K)
    sent = buffer.dispatch_send(x, topk_idx.astype(jnp.int32), topk_weights)
    sent = beside(sent, "dispatch_before")
    sent = buffer.dispatch_forward(sent) if forwards else sent
    recv = buffer.dispatch_recv(beside(sent, "dispatch_after"))
    h = jnp.tanh(jax.lax.ragged_dot(recv.x, w["up"], recv.group_sizes))
    y = jax.lax.ragged_dot(h, w["down"], recv.group_sizes)
    sent = buffer.combine_send(y, recv.layout, weights=recv.weights)
    sent = beside(sent, "combine_before")
    sent = buffer.combine_forward(sent) if forwards else sent
    return buffer.combine_recv(beside(sent, "combine_after")) + total


def schedule_of(f: Any, out_specs: Any, w: Any, specs: Any = SPECS) -> smf.Schedule:
    x = array(NUM_RANKS * T, H)
    compiled = aot.compile_for(aot.mesh_of_nodes(), f, (specs, P(AXES)), out_specs, w, x)
    return smf.inspect(compiled)


def gradient_schedule(model: Any, w: Any, specs: Any = SPECS) -> smf.Schedule:
    def loss(w: Any, x: Any) -> Any:
        return jax.lax.pmean(jnp.square(model(w, x).astype(jnp.float32)).mean(), AXES)

    return schedule_of(jax.value_and_grad(loss, argnums=(0, 1)), (P(), (specs, P(AXES))), w, specs)


def num_named(gemms: tuple[smf.Step, ...], name: str) -> int:
    return sum(1 for gemm in gemms if f"{name}_mlp" in gemm.op_name)


def check_placed(schedule: smf.Schedule, buffer: smf.Buffer, recomputed: int = 0) -> None:
    """Each pair is send, gemms, forward, gemms, recv, but for a dispatch that remat repeats."""
    assert not schedule.unmatched, str(schedule)
    assert not schedule.repeated, str(schedule)
    assert schedule.num_slots <= buffer.config.num_slots, str(schedule)
    again = [pair for pair in schedule.pairs if "rematted_computation" in pair.send.op_name]
    assert len(again) == recomputed, str(schedule)
    for pair in schedule.pairs:
        assert pair.forward is not None, str(schedule)
        assert pair.forward.op == pair.send.op.replace("_send", "_forward")
        assert pair.before + pair.after == pair.gemms
        if pair not in again:
            before, after, count = WITHIN[pair.send.op]
            assert num_named(pair.before, before) >= count, str(schedule)
            assert num_named(pair.after, after) >= count, str(schedule)


def test_forward_computes_on_both_sides(buffer: smf.Buffer) -> None:
    schedule = schedule_of(lambda w, x: layer(buffer, w, x), P(AXES), weights())
    assert schedule.counts == FORWARD
    check_placed(schedule, buffer)


@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
def test_gradient_computes_on_both_sides(buffer: smf.Buffer, remat: bool) -> None:
    def model(w: Any, x: Any) -> Any:
        return layer(buffer, w, x)

    schedule = gradient_schedule(jax.checkpoint(model) if remat else model, weights())
    check_counts(schedule, 2 if remat else 1)
    check_placed(schedule, buffer, recomputed=1 if remat else 0)


def check_counts(schedule: smf.Schedule, dispatches: int) -> None:
    """A recomputed combine would only give what nobody asks for."""
    forward = {op: dispatches if op.startswith("dispatch") else 1 for op in FORWARD}
    assert schedule.counts == {**forward, **BACKWARD}, str(schedule)


def scanned(body: Any) -> Any:
    return lambda w, x: jax.lax.scan(lambda x, w: (body(w, x), None), x, w)[0]


@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
def test_scanned_layers_compute_on_both_sides(buffer: smf.Buffer, remat: bool) -> None:
    def body(w: Any, x: Any) -> Any:
        return layer(buffer, w, x)

    specs = jax.tree.map(lambda spec: P(None, *spec), SPECS, is_leaf=lambda s: isinstance(s, P))
    model = scanned(jax.checkpoint(body) if remat else body)
    schedule = gradient_schedule(model, weights(NUM_LAYERS), specs)
    check_counts(schedule, 2 if remat else 1)
    check_placed(schedule, buffer, recomputed=1 if remat else 0)
    assert len({pair.send.callers for pair in schedule.pairs}) == 2, str(schedule)


def test_saved_by_name_a_dispatch_is_not_repeated(buffer: smf.Buffer) -> None:
    policy = jax.checkpoint_policies.save_only_these_names(smf.DISPATCHED)
    model = jax.checkpoint(lambda w, x: layer(buffer, w, x), policy=policy)
    schedule = gradient_schedule(model, weights())
    check_counts(schedule, 1)
    check_placed(schedule, buffer)


def test_a_recv_forwards_where_nobody_did(buffer: smf.Buffer) -> None:
    def model(w: Any, x: Any) -> Any:
        return layer(buffer, w, x, ("dispatch_before", "combine_before"), forwards=False)

    schedule = gradient_schedule(model, weights())
    check_counts(schedule, 1)
    assert not schedule.unmatched, str(schedule)
    for pair in schedule.pairs:
        before, after, count = WITHIN[pair.send.op]
        placed = (pair.after, after) if "backward" in pair.send.op else (pair.before, before)
        assert num_named(*placed) >= count, str(schedule)


def test_a_layer_at_once_computes_while_rows_travel_between_nodes(buffer: smf.Buffer) -> None:
    def model(w: Any, x: Any) -> Any:
        def before(x: Any) -> Any:
            with jax.named_scope("dispatch_before_mlp"):
                return jnp.tanh(x @ w["dispatch_before"][0])

        def after(h: Any) -> Any:
            with jax.named_scope("combine_after_mlp"):
                return h @ w["combine_after"][1]

        def experts(recv: Any) -> Any:
            h = jnp.tanh(jax.lax.ragged_dot(recv.x, w["up"], recv.group_sizes))
            return jax.lax.ragged_dot(h, w["down"], recv.group_sizes)

        scores = jax.nn.softmax((x @ w["router"]).astype(jnp.float32))
        topk_weights, topk_idx = jax.lax.top_k(scores, TOP_K)
        return smf.moe(x, topk_idx, topk_weights, experts, buffer, shared=(before, after))

    schedule = gradient_schedule(model, weights())
    check_counts(schedule, 1)
    gemms = {pair.send.op: (pair.before, pair.after) for pair in schedule.pairs}
    assert num_named(gemms["dispatch_send"][0], "dispatch_before") == 1, str(schedule)
    assert num_named(gemms["combine_send"][1], "combine_after") == 1, str(schedule)
    assert num_named(gemms["combine_backward_send"][0], "combine_after") == 2, str(schedule)
    assert num_named(gemms["dispatch_backward_send"][1], "dispatch_before") == 2, str(schedule)


def test_one_tier_has_no_forward(buffer: smf.Buffer) -> None:
    del buffer
    flat = smf.Buffer(aot.mesh_of_nodes(), AXES, **SIZES)
    schedule = schedule_of(lambda w, x: layer(flat, w, x), P(AXES), weights())
    assert set(schedule.counts) == {op for op in FORWARD if not op.endswith("forward")}
    assert all(pair.forward is None and pair.before == pair.gemms for pair in schedule.pairs)


def test_an_unused_exchange_leaves_nothing_behind(buffer: smf.Buffer) -> None:
    def f(w: Any, x: Any) -> Any:
        layer(buffer, w, x)
        return x

    assert schedule_of(f, P(AXES), weights()).counts == {}


@pytest.mark.parametrize("wanted", ["dispatch_before", "combine_after", "down", "router"])
@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
def test_gradient_of_some_weights_leaves_pairs_whole(
    buffer: smf.Buffer, wanted: str, remat: bool
) -> None:
    model = jax.checkpoint(layer, static_argnums=0) if remat else layer

    def loss(part: Any, rest: Any, x: Any) -> Any:
        y = model(buffer, {**rest, wanted: part}, x)
        return jax.lax.pmean(y.astype(jnp.float32).mean(), AXES)

    def f(w: Any, x: Any) -> Any:
        return jax.grad(loss)(w[wanted], w, x)

    schedule = schedule_of(f, SPECS[wanted], weights())
    assert not schedule.unmatched, str(schedule)
    assert all(pair.forward is not None for pair in schedule.pairs), str(schedule)
    assert schedule.num_slots <= buffer.config.num_slots


def test_the_reference_rounds_the_sums_of_nodes() -> None:
    """XLA drops a cast and its way back, also between two loops, if both are outside of them."""
    aot.require_gpu_compiler()
    mesh = aot.mesh(num_gpus=1)
    addends = jax.ShapeDtypeStruct((4, T, H), jnp.bfloat16, sharding=jax.NamedSharding(mesh, P()))
    compiled = jax.jit(lambda a: sum_by_node(a, 2, 2)).lower(addends).compile().as_text()
    assert re.search(rf"bf16\[2,{T},{H}\]\S* convert\(", compiled), compiled
