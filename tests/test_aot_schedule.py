"""What XLA:GPU makes of the ops, for four H200s: read from programs compiled ahead of time."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import aot
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jax_sm_free as smf
from jax_sm_free import native

NUM_RANKS, T, H, F, E, TOP_K, NUM_LAYERS = 4, 1024, 1024, 2048, 16, 2, 3
SIZES = {"hidden": H, "num_experts": E, "top_k": TOP_K, "max_tokens": T}
# Weights, a pytree: the router's and the shared experts' are the same on all ranks.
SPECS = {
    "router": P(),
    "up": P("ep"),
    "down": P("ep"),
    "shared": (P(), P()),
    "more": (P(), P()),
}
FORWARD = {"dispatch_send": 1, "combine_send": 1}
BACKWARD = {"combine_backward_send": 1, "dispatch_backward_send": 1}


@pytest.fixture
def buffer() -> smf.Buffer:
    return smf.Buffer(aot.mesh(), "ep", **SIZES)


def array(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def weights() -> dict[str, Any]:
    mlp = (array(H, F), array(F, H))
    return {
        "router": array(H, E),
        "up": array(E, H, F),
        "down": array(E, F, H),
        "shared": mlp,
        "more": mlp,
    }


def named_mlp(name: str) -> Any:
    """A shared expert whose operations carry a name in the compiled program."""

    def mlp(x: Any, up: Any, down: Any) -> Any:
        with jax.named_scope(name):
            return jnp.tanh(x @ up) @ down

    return mlp


def moe_layer(buffer: smf.Buffer, w: Any, x: Any, with_overlap: bool = True) -> Any:
    def beside(sent: Any, name: str) -> Any:
        mlp = named_mlp(f"{name}_mlp")
        if with_overlap:
            return smf.overlap(sent, mlp, x, *w[name])
        return mlp(x, *w[name]), sent

    scores = jax.nn.softmax((x @ w["router"]).astype(jnp.float32))
    topk_weights, topk_idx = jax.lax.top_k(scores, TOP_K)
    sent = buffer.dispatch_send(x, topk_idx.astype(jnp.int32), topk_weights)
    shared, sent = beside(sent, "shared")
    recv = buffer.dispatch_recv(sent)
    h = jnp.tanh(jax.lax.ragged_dot(recv.x, w["up"], recv.group_sizes))
    y = jax.lax.ragged_dot(h, w["down"], recv.group_sizes)
    sent = buffer.combine_send(y, recv.layout, weights=recv.weights)
    more, sent = beside(sent, "more")
    return x + shared + more + buffer.combine_recv(sent)


def schedule_of(f: Any, out_specs: Any, w: Any, specs: Any = SPECS, **options: Any) -> smf.Schedule:
    x = array(NUM_RANKS * T, H)
    compiled = aot.compile_for(
        aot.mesh(), f, (specs, P("ep")), out_specs, w, x, options=options or None
    )
    return smf.inspect(compiled)


def gradient_schedule(model: Any, w: Any, specs: Any) -> smf.Schedule:
    def loss(w: Any, x: Any) -> Any:
        return jax.lax.pmean(jnp.square(model(w, x).astype(jnp.float32)).mean(), "ep")

    return schedule_of(jax.value_and_grad(loss, argnums=(0, 1)), (P(), (specs, P("ep"))), w, specs)


def num_sends(schedule: smf.Schedule) -> dict[str, int]:
    return dict(Counter(step.op for step in schedule.steps if step.kind == "send"))


def gemms_named(pair: Any, name: str) -> int:
    return sum(1 for gemm in pair.gemms if f"{name}_mlp" in gemm.op_name)


# GEMMs of a shared expert within each pair: its two, then the gradients of both operands of both.
WITHIN = {
    "dispatch_send": ("shared", 2),
    "combine_send": ("more", 2),
    "combine_backward_send": ("more", 4),
    "dispatch_backward_send": ("shared", 4),
}


def is_recomputed(pair: Any) -> bool:
    return "rematted_computation" in pair.send.op_name


def check_overlapped(schedule: smf.Schedule, buffer: smf.Buffer, recomputed: int = 0) -> None:
    """The shared experts' GEMMs lie within their pairs, forward and backward.

    Not in a dispatch that remat repeats: there nobody asks for what `overlap` returns, and what its
    gradient needs from inside is XLA's to place.
    """
    assert not schedule.unmatched, str(schedule)
    assert schedule.num_slots <= buffer.config.num_slots, str(schedule)
    assert sum(map(is_recomputed, schedule.pairs)) == recomputed, str(schedule)
    for pair in schedule.pairs:
        name, count = WITHIN[pair.send.op]
        assert is_recomputed(pair) or gemms_named(pair, name) >= count, str(schedule)


# ----------------------------------------------------------------------------------- overlap


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "cublas"])
def test_forward_computes_between_send_and_recv(buffer: smf.Buffer, triton: bool) -> None:
    schedule = schedule_of(
        lambda w, x: moe_layer(buffer, w, x),
        P("ep"),
        weights(),
        xla_gpu_enable_triton_gemm=triton,
    )
    assert num_sends(schedule) == FORWARD
    check_overlapped(schedule, buffer)


@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
def test_gradient_computes_between_send_and_recv(buffer: smf.Buffer, remat: bool) -> None:
    def model(w: Any, x: Any) -> Any:
        return moe_layer(buffer, w, x)

    schedule = gradient_schedule(jax.checkpoint(model) if remat else model, weights(), SPECS)
    # A recomputed combine would only give what nobody asks for.
    assert num_sends(schedule) == {**FORWARD, **BACKWARD, "dispatch_send": 2 if remat else 1}
    check_overlapped(schedule, buffer, recomputed=1 if remat else 0)


@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
def test_scanned_layers_compute_between_send_and_recv(buffer: smf.Buffer, remat: bool) -> None:
    def model(w: Any, x: Any) -> Any:
        def body(x: Any, w: Any) -> Any:
            return moe_layer(buffer, w, x), None

        return jax.lax.scan(jax.checkpoint(body) if remat else body, x, w)[0]

    stacked = jax.tree.map(lambda leaf: array(NUM_LAYERS, *leaf.shape), weights())
    specs = jax.tree.map(lambda spec: P(None, *spec), SPECS, is_leaf=lambda s: isinstance(s, P))
    schedule = gradient_schedule(model, stacked, specs)
    assert num_sends(schedule) == {**FORWARD, **BACKWARD, "dispatch_send": 2 if remat else 1}
    assert all(
        pair.send.callers and pair.send.callers == pair.recv.callers for pair in schedule.pairs
    )
    assert len({pair.send.callers for pair in schedule.pairs}) == 2, (
        "expected one loop forward and one backward"
    )
    check_overlapped(schedule, buffer, recomputed=1 if remat else 0)


def test_without_overlap_nothing_lies_between(buffer: smf.Buffer) -> None:
    schedule = schedule_of(
        lambda w, x: moe_layer(buffer, w, x, with_overlap=False), P("ep"), weights()
    )
    assert num_sends(schedule) == FORWARD
    assert not schedule.unmatched
    for pair in schedule.pairs:
        assert gemms_named(pair, "shared") + gemms_named(pair, "more") == 0, str(schedule)


# ------------------------------------------------------------------------- merging, hoisting


def exchange(buffer: smf.Buffer, x: Any) -> Any:
    """A dispatch and its combine, of rows that go to experts 0 and 1."""
    topk_idx = jnp.broadcast_to(jnp.arange(TOP_K, dtype=jnp.int32), (x.shape[0], TOP_K))
    recv = buffer.dispatch(x, topk_idx, jnp.ones(topk_idx.shape))
    return buffer.combine(recv.x, recv.layout)


def test_equal_layers_are_not_merged(buffer: smf.Buffer) -> None:
    schedule = schedule_of(
        lambda _, x: exchange(buffer, x) + exchange(buffer, x), P("ep"), {}, specs={}
    )
    assert num_sends(schedule) == {"dispatch_send": 2, "combine_send": 2}
    assert not schedule.unmatched


def test_invariant_exchange_stays_in_its_loop(buffer: smf.Buffer) -> None:
    def f(_: Any, x: Any) -> Any:
        return jax.lax.scan(lambda y, _: (y + exchange(buffer, x), None), x, length=NUM_LAYERS)[0]

    schedule = schedule_of(f, P("ep"), {}, specs={})
    assert num_sends(schedule) == FORWARD
    assert not schedule.unmatched
    assert all(step.callers for step in schedule.steps if step.kind != "gemm"), str(schedule)


def test_unused_exchange_leaves_no_send_behind(buffer: smf.Buffer) -> None:
    def f(w: Any, x: Any) -> Any:
        moe_layer(buffer, w, x)
        return x

    assert not schedule_of(f, P("ep"), weights()).unmatched


@pytest.mark.parametrize("wanted", ["shared", "down", "router"])
def test_gradient_of_some_weights_leaves_pairs_whole(buffer: smf.Buffer, wanted: str) -> None:
    def loss(part: Any, rest: Any, x: Any) -> Any:
        y = moe_layer(buffer, {**rest, wanted: part}, x)
        return jax.lax.pmean(y.astype(jnp.float32).mean(), "ep")

    def f(w: Any, x: Any) -> Any:
        return jax.grad(loss)(w[wanted], w, x)

    schedule = schedule_of(f, SPECS[wanted], weights())
    assert not schedule.unmatched, str(schedule)
    assert schedule.num_slots <= buffer.config.num_slots


# ------------------------------------------------------------------------- abstract devices


def test_abstract_devices_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise AssertionError("opened a buffer for devices that are not there")

    monkeypatch.setattr(native.Native, "open_buffer", refuse)
    buffer, other = (smf.Buffer(aot.mesh(), "ep", **SIZES) for _ in range(2))
    assert buffer.transport == "abstract"
    buffer.check()

    def f(_: Any, x: Any) -> Any:
        return exchange(buffer, x) + exchange(other, x)

    schedule = schedule_of(f, P("ep"), {}, specs={})
    numbers = {step.buffer for step in schedule.steps}
    assert len(numbers) == 2, f"expected two buffers, got {numbers}"
    assert schedule.num_slots == 1
    with buffer, other:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        schedule_of(f, P("ep"), {}, specs={})


def run_in_new_process(*lines: str) -> None:
    """Runs statements after the imports that they need."""
    imports = (
        "import sys; sys.path.insert(0, 'tests')",
        "import conftest, aot, jax, numpy as np, jax_sm_free as smf, test_aot_schedule as t",
        "from jax_sm_free import native",
    )
    script = "\n".join((*imports, *lines))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


USE_GPUS = "t.check_exchange(smf.Buffer(aot.mesh(), 'ep', **t.SIZES))"
USE_CPUS = (
    "mesh = jax.sharding.Mesh(np.array(jax.devices('cpu')[:4]), 'ep')",
    "buffer = smf.Buffer(mesh, 'ep', **t.SIZES)",
    "f = jax.shard_map(lambda x: t.exchange(buffer, x), mesh=mesh, in_specs=t.P('ep'),"
    " out_specs=t.P('ep'))",
    "x = jax.numpy.ones((4 * 8, t.H), jax.numpy.bfloat16)",
    "assert (jax.jit(f)(x) == 2).all()",
)


def check_exchange(buffer: smf.Buffer) -> None:
    schedule = schedule_of(lambda _, x: exchange(buffer, x), P("ep"), {}, specs={})
    assert num_sends(schedule) == FORWARD
    assert not schedule.unmatched


def test_compiles_where_no_other_devices_are_used() -> None:
    aot.require_gpu_compiler()
    run_in_new_process(USE_GPUS, "assert native.register_cpu.cache_info().currsize == 0")


@pytest.mark.parametrize("first", ["gpus", "cpus"])
def test_compiles_beside_cpu_devices(first: str) -> None:
    aot.require_gpu_compiler()
    if first == "gpus":
        run_in_new_process(USE_GPUS, *USE_CPUS, USE_GPUS)
    else:
        run_in_new_process(*USE_CPUS, USE_GPUS, *USE_CPUS)
