"""A layer over several processes: its buffer, its inputs, what it gives, and acting within it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sample_programs

import jax_sm_free as smf
from processes import together

TIMEOUT_S = 3.0  # of buffers in tests that let the timeout pass
MARGIN_S = 8.0  # how much later an error may come on a busy machine
LONG_S = 60.0  # of buffers in tests in which no timeout may pass
AT_ONCE_S = LONG_S / 2
TOKENS, HIDDEN, TOP_K = 5, 6, 2
# Where a process may be made to act in `layer_of`.
PLACES = ("before_send", "between", "before_combine")


def mesh_of(processes: int | None = None, num_nodes: int = 1) -> jax.sharding.Mesh:
    """All devices, or those of the first processes. Several nodes are the axis "node"."""
    devices = [d for d in jax.devices() if processes is None or d.process_index < processes]
    if num_nodes == 1:
        return jax.sharding.Mesh(np.array(devices), ("ep",))
    return jax.sharding.Mesh(np.array(devices).reshape(num_nodes, -1), ("node", "ep"))


def axes_of(mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """The axes of a buffer: all but "dp"."""
    return tuple(axis for axis in mesh.axis_names if axis != "dp")


def group_size(mesh: jax.sharding.Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes_of(mesh))


def open_buffer(mesh: jax.sharding.Mesh, **sizes: Any) -> smf.Buffer:
    """A buffer of two tiers where the mesh has an axis "node"."""
    defaults = {
        "hidden": HIDDEN,
        "num_experts": mesh.size,
        "top_k": TOP_K,
        "max_tokens": TOKENS,
        # Also where all tokens name one expert twice.
        "recv_capacity": group_size(mesh) * TOKENS * TOP_K,
        "dtype": jnp.float32,
        "timeout_s": LONG_S,
        "node_axis": "node" if "node" in mesh.axis_names else None,
    }
    return smf.Buffer(mesh, axes_of(mesh), **(defaults | sizes))


def make_inputs(mesh: jax.sharding.Mesh, seed: int = 0) -> tuple[Any, ...]:
    """x, topk_idx, weights, as arrays over all processes."""
    rng = np.random.default_rng(seed)
    rows = mesh.size * TOKENS
    arrays = (
        rng.integers(-9, 9, (rows, HIDDEN)).astype(np.float32),
        rng.integers(0, group_size(mesh), (rows, TOP_K)).astype(np.int32),
        rng.integers(1, 9, (rows, TOP_K)).astype(np.float32),
    )
    sharding = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    return tuple(jax.make_array_from_callback(a.shape, sharding, a.__getitem__) for a in arrays)


def on_ranks(mesh: jax.sharding.Mesh, fn: Callable[..., Any]) -> Callable[..., Any]:
    spec = jax.P(mesh.axis_names)
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec))


@dataclasses.dataclass
class Action:
    """Something that this process does once, at one place of a run."""

    place: str = ""
    do: Callable[[], None] = lambda: None

    def at(self, place: str) -> None:
        if place == self.place:
            self.place = ""
            self.do()


def layer_of(buffer: smf.Buffer, action: Action) -> Callable[..., Any]:
    """Every token to its experts, and the sum of what comes back: x * the sum of its weights."""

    def at(place: str, value: Any) -> Any:
        def on_host(value: Any) -> Any:
            action.at(place)
            return np.asarray(value)

        return jax.pure_callback(on_host, jax.typeof(value), value)

    def layer(x: Any, topk_idx: Any, weights: Any) -> Any:
        sent = buffer.dispatch_send(at("before_send", x), topk_idx, weights)
        between, sent = sample_programs.after(x, sent)
        _, sent = sample_programs.after(at("between", between), sent)
        recv = buffer.dispatch_recv(sent)
        return buffer.combine(at("before_combine", recv.x), recv.layout, weights=recv.weights)

    return layer


def layer_without_actions(buffer: smf.Buffer) -> Callable[..., Any]:
    """The same layer as `layer_of` without callbacks."""

    def layer(x: Any, topk_idx: Any, weights: Any) -> Any:
        recv = buffer.dispatch(x, topk_idx, weights)
        return buffer.combine(recv.x, recv.layout, weights=recv.weights)

    return layer


def check(out: Any, inputs: tuple[Any, ...]) -> None:
    """Raises unless this process's part of the layer's result is right; the numbers are exact."""
    for got, x, _, weights in zip(*(a.addressable_shards for a in (out, *inputs)), strict=True):
        want = np.asarray(x.data) * np.asarray(weights.data).sum(1, keepdims=True)
        np.testing.assert_array_equal(np.asarray(got.data), want)


def run_well(run: Callable[..., Any], mesh: jax.sharding.Mesh, inputs: tuple[Any, ...]) -> None:
    """A run that must succeed. All processes begin it together and wait for its end."""
    together.compile_and_meet(run, mesh, *inputs)
    check(run(*inputs), inputs)
    together.meet(mesh)


def check_new_buffer(processes: int | None = None, num_nodes: int = 1) -> None:
    """Opens a buffer over the first processes and runs the layer."""
    mesh = mesh_of(processes, num_nodes)
    with open_buffer(mesh) as buffer:
        inputs = make_inputs(mesh)
        check(on_ranks(mesh, layer_of(buffer, Action()))(*inputs), inputs)


def error_and_seconds(run: Callable[[], Any]) -> tuple[str, float]:
    """The error of a run that must fail, and how long it took."""
    start = time.monotonic()
    try:
        jax.block_until_ready(run())
    except Exception as error:
        return str(error), time.monotonic() - start
    raise AssertionError("expected the run to fail, but it gave a result")


def fault_of(buffer: smf.Buffer) -> str:
    try:
        buffer.check()
    except smf.FaultError as fault:
        return str(fault)
    return ""
