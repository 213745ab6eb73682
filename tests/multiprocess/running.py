"""What ranks run in the tests of several processes in which all goes well."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import layers
import numpy as np

import jax_sm_free as smf


def run_after_others_were_compiled() -> None:
    """The first process compiles programs equal to those that all run, but does not run them."""
    mesh = layers.mesh_of()
    inputs = layers.make_inputs(mesh)
    kept = []
    with layers.open_buffer(mesh) as buffer:
        for _ in range(3):
            layer = layers.layer_of(buffer, layers.Action())
            if jax.process_index() == 0:
                kept += [layers.on_ranks(mesh, layer).lower(*inputs).compile() for _ in range(2)]
            pending = [layers.on_ranks(mesh, layer)(*inputs) for _ in range(3)]
            for out in pending:
                layers.check(out, inputs)
        buffer.check()


def run_many(num_runs: int, in_flight: int, num_nodes: int = 1) -> None:
    """Two buffers of different sizes, in turn, with several runs in flight."""
    mesh = layers.mesh_of(num_nodes=num_nodes)
    with (
        layers.open_buffer(mesh) as one,
        layers.open_buffer(mesh, num_experts=2 * mesh.size) as two,
    ):
        runs = [
            layers.on_ranks(mesh, layers.layer_of(buffer, layers.Action())) for buffer in (one, two)
        ]
        pending: list[tuple[Any, Any]] = []
        for number in range(num_runs):
            inputs = layers.make_inputs(mesh, number)
            pending.append((runs[number % 2](*inputs), inputs))
            if len(pending) == in_flight:
                for out, given in pending:
                    layers.check(out, given)
                pending.clear()
        for out, given in pending:
            layers.check(out, given)
        one.check()
        two.check()


def run_alone() -> None:
    """On a buffer over this process's own devices."""
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("ep",))
    with layers.open_buffer(mesh) as buffer:
        inputs = layers.make_inputs(mesh, seed=jax.process_index())
        run = layers.on_ranks(mesh, layers.layer_of(buffer, layers.Action()))
        layers.check(run(*inputs), inputs)
        assert buffer.message_bytes(jax.local_devices()[-1]) > 0


def run_in_groups() -> None:
    """Two groups at once, devices in turn; and a buffer over all devices beside theirs."""
    devices = np.array(jax.devices()).reshape(-1, 2).T
    meshes = (jax.sharding.Mesh(devices, ("dp", "ep")), layers.mesh_of())
    num_experts = 2 * devices.size
    with contextlib.ExitStack() as stack:
        runs = []
        for mesh in meshes:
            buffer = stack.enter_context(layers.open_buffer(mesh, num_experts=num_experts))
            runs.append((mesh, layers.on_ranks(mesh, layers.layer_of(buffer, layers.Action()))))
        for number in range(20):
            for mesh, run in runs:
                inputs = layers.make_inputs(mesh, number)
                layers.check(run(*inputs), inputs)


def run_shared() -> None:
    """Equal programs without callbacks, which JAX puts into its cache of compiled programs."""
    mesh = layers.mesh_of()
    with layers.open_buffer(mesh) as buffer:
        one = layers.on_ranks(mesh, layers.layer_without_actions(buffer))
        other = layers.on_ranks(mesh, layers.layer_without_actions(buffer))
        for number in range(20):
            if number == 10:
                jax.clear_caches()
            inputs = layers.make_inputs(mesh, number)
            layers.check((one if number % 3 else other)(*inputs), inputs)
        buffer.check()


def run_mapped(num_places: int) -> None:
    """Several exchanges of one call, under jax.vmap, in flight at once and named apart."""
    mesh = layers.mesh_of()
    with layers.open_buffer(mesh, num_slots=num_places) as buffer:
        layer = layers.layer_without_actions(buffer)

        def mapped(x: Any, topk_idx: Any, weights: Any) -> Any:
            factors = jnp.arange(1.0, num_places + 1)
            per_place = lambda factor: layer(factor * x, topk_idx, weights)  # noqa: E731
            return jax.vmap(per_place)(factors).sum(0)

        run = layers.on_ranks(mesh, mapped)
        text = run.lower(*layers.make_inputs(mesh)).as_text()
        calls = re.findall(r'call = "([^"]*_send [^"]*)"', text)
        assert len(set(calls)) == len(calls) == 2 * num_places, calls
        for number in range(20):
            x, topk_idx, weights = layers.make_inputs(mesh, number)
            want = x * float(sum(range(1, num_places + 1)))
            layers.check(run(x, topk_idx, weights), (want, topk_idx, weights))
        buffer.check()


def run_found_while_traced() -> None:
    """Layers that open their buffer while all processes trace the same program."""
    mesh = layers.mesh_of()
    sizes = {
        "hidden": layers.HIDDEN,
        "top_k": layers.TOP_K,
        "max_tokens": layers.TOKENS,
        "dtype": jnp.float32,
    }
    sizes |= {"num_experts": mesh.size, "recv_capacity": mesh.size * layers.TOKENS * layers.TOP_K}

    def layer(x: Any, topk_idx: Any, weights: Any) -> Any:
        return layers.layer_without_actions(smf.buffer_for("ep", **sizes))(x, topk_idx, weights)

    inputs = layers.make_inputs(mesh)
    with jax.set_mesh(mesh):
        layers.check(layers.on_ranks(mesh, layer)(*inputs), inputs)
        smf.buffer_for("ep", **sizes).check()
