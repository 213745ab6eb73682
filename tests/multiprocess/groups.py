"""What ranks run in the tests of several groups over several processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from layers import (
    TIMEOUT_S,
    Action,
    error_and_seconds,
    fault_of,
    layer_of,
    make_inputs,
    on_ranks,
    open_buffer,
)

from processes import rank, together

EP_SIZE = 2
AXES = ("dp", "ep")
# How long one wait in vain for another group may take, and all such waits together.
PATIENCE_S, ALL_PATIENCE_S = 1.0, 2.0


def mesh_of(groups_span_processes: bool) -> jax.sharding.Mesh:
    """A mesh whose groups have devices of one process, or of several."""
    devices = np.array(jax.devices())
    if groups_span_processes:
        return jax.sharding.Mesh(devices.reshape(EP_SIZE, -1).T, AXES)
    return jax.sharding.Mesh(devices.reshape(-1, EP_SIZE), AXES)


def loss_of(layer: Callable[..., Any]) -> Callable[..., Any]:
    """The loss over all groups together."""

    def loss(x: Any, topk_idx: Any, weights: Any) -> Any:
        return jax.lax.psum((layer(x, topk_idx, weights) ** 2).sum(), AXES)[None]

    return loss


def fail_in_one_group(how: str, groups_span_processes: bool) -> tuple[str, float, str]:
    """A good run, and one in which the last rank of the last group goes wrong.

    Args:
      how: "index" for an expert that there is not, "stall" for a rank of its process that is late.
      groups_span_processes: see `mesh_of`.

    Returns:
      The error, the seconds it took, and what `check` raised.
    """
    mesh, action = mesh_of(groups_span_processes), Action()
    x, topk_idx, weights = make_inputs(mesh)
    with open_buffer(mesh, timeout_s=TIMEOUT_S) as buffer:
        run = on_ranks(mesh, loss_of(layer_of(buffer, action)))
        together.compile_and_meet(run, mesh, x, topk_idx, weights)
        jax.block_until_ready(run(x, topk_idx, weights))
        if how == "stall" and mesh.devices[-1, -1].process_index == jax.process_index():
            action.place, action.do = "before_send", lambda: time.sleep(TIMEOUT_S + 2)
        if how == "index":
            topk_idx = with_wrong_index(topk_idx)
        together.meet(mesh)
        error, seconds = error_and_seconds(lambda: run(x, topk_idx, weights))
        rank.announce("has failed")
        return error, seconds, fault_of(buffer)


def with_wrong_index(topk_idx: Any) -> Any:
    """The same indices, with one that is too large in the last row of the last rank."""

    def part(index: Any) -> Any:
        values = np.zeros(topk_idx.shape, np.int32)
        values[-1, 0] = 1000
        return values[index]

    wrong = jax.make_array_from_callback(topk_idx.shape, topk_idx.sharding, part)
    return jax.jit(jnp.add)(topk_idx, wrong)


def run_in_one_group_alone(groups_span_processes: bool) -> list[float]:
    """Only the first group runs one layer, then all groups run another; seconds of six runs."""
    mesh = mesh_of(groups_span_processes)
    inputs = make_inputs(mesh)
    with open_buffer(mesh) as buffer:
        layer = layer_of(buffer, Action())

        def program(x: Any, topk_idx: Any, weights: Any) -> Any:
            is_first = jax.lax.axis_index("dp") == 0
            x = jax.lax.cond(is_first, layer, lambda x, *_: x, x, topk_idx, weights)
            return loss_of(layer)(x, topk_idx, weights)

        run = on_ranks(mesh, program)
        together.compile_and_meet(run, mesh, *inputs)
        seconds = []
        for _ in range(6):
            start = time.monotonic()
            out = run(*inputs)
            check_sum(out, inputs)
            seconds.append(time.monotonic() - start)
        buffer.check()
    return seconds


def check_sum(out: Any, inputs: tuple[Any, ...]) -> None:
    """Compares `out` with a sum that each process computes by itself; the numbers are exact."""

    def want(x: Any, topk_idx: Any, weights: Any) -> Any:
        del topk_idx
        factor = weights.sum(1, keepdims=True)
        once = jnp.where(jax.lax.axis_index("dp") == 0, x * factor, x)
        return jax.lax.psum(((once * factor) ** 2).sum(), AXES)[None]

    sums = on_ranks(inputs[0].sharding.mesh, want)(*inputs)
    for got, expected in zip(out.addressable_shards, sums.addressable_shards, strict=True):
        np.testing.assert_allclose(np.asarray(got.data), np.asarray(expected.data), rtol=1e-5)
