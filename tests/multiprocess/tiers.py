"""What ranks run in the tests of two tiers over several processes."""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import layers
import numpy as np

import jax_sm_free as smf
from jax_sm_free import reference
from processes import rank, together


def check_against_reference(shape: dict[str, int], axes: tuple[str, ...]) -> None:
    """A layer and its gradients: received as in one tier, and summed as the reference sums.

    Args:
      shape: sizes of the axes of the mesh, over the devices of all processes in their order.
      axes: those of the buffer, in the order of its ranks.
    """
    devices = np.array(jax.devices()).reshape(*shape.values())
    mesh = jax.sharding.Mesh(devices, tuple(shape))
    inputs = make_inputs(mesh, math.prod(shape[axis] for axis in axes))
    received, summed = results_of(smf, mesh, axes, "node", inputs)
    want_received, want_summed = results_of(reference, mesh, axes, "node", inputs)
    assert_same(received, want_received)
    assert_same(summed["out"], want_summed["out"])
    assert_same(summed["grads"], want_summed["grads"], rtol=1e-5)
    flat_received, _ = results_of(smf, mesh, axes, None, inputs)
    assert_same(received, flat_received)


def make_inputs(mesh: jax.sharding.Mesh, ep_size: int) -> tuple[Any, ...]:
    """x, topk_idx, weights of all ranks. The order in which rows are added changes their sums."""
    rng = np.random.default_rng(7)
    rows = mesh.size * layers.TOKENS
    return layers.over_processes(
        mesh,
        rng.standard_normal((rows, layers.HIDDEN)).astype(np.float32),
        rng.integers(-1, 2 * ep_size, (rows, 4)).astype(np.int32),
        rng.standard_normal((rows, 4)).astype(np.float32),
    )


def results_of(
    module: ModuleType,
    mesh: jax.sharding.Mesh,
    axes: tuple[str, ...],
    node_axis: str | None,
    inputs: tuple[Any, ...],
) -> tuple[Any, Any]:
    """What a layer receives; and its result and gradients, of which each row has another factor."""
    ep_size = math.prod(mesh.shape[axis] for axis in axes)
    buffer = module.Buffer(
        mesh,
        axes,
        node_axis=node_axis,
        hidden=layers.HIDDEN,
        num_experts=2 * ep_size,
        top_k=4,
        max_tokens=layers.TOKENS,
        dtype=jnp.float32,
        timeout_s=layers.LONG_S,
    )

    def program(x: Any, topk_idx: Any, weights: Any) -> Any:
        def loss(x: Any, weights: Any) -> Any:
            recv = buffer.dispatch(x, topk_idx, weights)
            factors = 2.0 ** (jnp.arange(recv.x.shape[0]) % 3)[:, None]  # products are exact
            out = buffer.combine(recv.x * factors, recv.layout, weights=recv.weights)
            layout = dataclasses.replace(recv.layout, node_topk=None)
            return (out**2).sum(), (dataclasses.replace(recv, layout=layout), out)

        grads, (recv, out) = jax.grad(loss, (0, 1), has_aux=True)(x, weights)
        return jax.tree.map(lambda a: a[None], (recv, {"out": out, "grads": grads}))

    run = layers.on_ranks(mesh, program)
    together.compile_and_meet(run, mesh, *inputs)
    results = jax.block_until_ready(run(*inputs))
    buffer.close()
    return results


def assert_same(got: Any, want: Any, rtol: float | None = None) -> None:
    """This process's parts of two trees of 32-bit numbers: equal bits, or but for rounding."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        for here, there in zip(a.addressable_shards, b.addressable_shards, strict=True):
            one, other = np.asarray(here.data), np.asarray(there.data)
            if rtol is None:
                np.testing.assert_array_equal(one.view(np.int32), other.view(np.int32))
            else:
                np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol)


def run_many(num_runs: int, in_flight: int, num_nodes: int) -> None:
    """A buffer of two tiers and one of one tier, in turn, with several runs in flight."""
    mesh, flat_mesh = layers.mesh_of(num_nodes=num_nodes), layers.mesh_of()
    with layers.open_buffer(mesh) as tiers, layers.open_buffer(flat_mesh) as flat:
        runs = [
            (mesh, layers.on_ranks(mesh, layers.layer_of(buffer, layers.Action())))
            for mesh, buffer in ((mesh, tiers), (flat_mesh, flat))
        ]
        pending: list[tuple[Any, Any]] = []
        for number in range(num_runs):
            mesh, run = runs[number % 2]
            inputs = layers.make_inputs(mesh, number)
            pending.append((run(*inputs), inputs))
            if len(pending) == in_flight or number == num_runs - 1:
                for out, given in pending:
                    layers.check(out, given)
                pending.clear()
        tiers.check()
        flat.check()


def dispatch_to_all(
    num_runs: int, tokens: int, hidden: int, num_hosts: int, node_axis: str | None
) -> None:
    """Every token goes to every rank. Pauses before and behind the runs.

    Processes take the hosts in turn, and a node is a host.
    """
    by_turn = np.array(jax.devices()).reshape(-1, num_hosts)
    mesh = jax.sharding.Mesh(by_turn.T, ("node", "gpu"))
    sizes = {"hidden": hidden, "max_tokens": tokens, "top_k": mesh.size}
    axes = mesh.axis_names
    with smf.Buffer(
        mesh, axes, node_axis=node_axis, num_experts=mesh.size, dtype=jnp.float32, **sizes
    ) as buffer:

        def received(x: Any) -> Any:
            everyone = jnp.broadcast_to(jnp.arange(mesh.size), (tokens, mesh.size))
            return buffer.dispatch(x, everyone, jnp.ones((tokens, mesh.size))).x

        x = np.arange(mesh.size * tokens, dtype=np.float32)[:, None] + np.zeros(hidden, np.float32)
        sharding = jax.NamedSharding(mesh, jax.P(axes))
        given = jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
        run = jax.jit(
            jax.shard_map(received, mesh=mesh, in_specs=jax.P(axes), out_specs=jax.P(axes))
        )
        together.compile_and_meet(run, mesh, given)
        rank.pause("before")
        for _ in range(num_runs):
            for shard in run(given).addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data), x)
        rank.pause("behind")
