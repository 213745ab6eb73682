"""How often a layer under `jax.checkpoint` dispatches, by the policy.

Here, and in programs compiled for GPUs that are only described.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sample_inputs
import support
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from support import P

import jax_sm_free as smf

CONFIG = support.make_config(num_experts=2 * support.SOME_RANKS, num_slots=4)
AOT_RANKS = 4
policies = jax.checkpoint_policies


def offloading(saved: list[str], offloaded: list[str]) -> Any:
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=saved,
        names_which_can_be_offloaded=offloaded,
        offload_src="device",
        offload_dst="pinned_host",
    )


# For each policy the dispatches of a gradient: one, or one more in the backward pass.
POLICIES = {
    "nothing": (policies.nothing_saveable, 2),
    "everything": (policies.everything_saveable, 1),
    "dots": (policies.dots_saveable, 2),
    "dispatched": (policies.save_only_these_names(smf.DISPATCHED), 1),
    "dispatched_and_dots": (
        policies.save_from_both_policies(
            policies.dots_saveable, policies.save_only_these_names(smf.DISPATCHED)
        ),
        1,
    ),
    "other_names": (policies.save_any_names_but_these(smf.DISPATCHED), 2),
    "rows_alone": (policies.save_only_these_names(smf.DISPATCHED_ROWS), 2),
    "offloaded": (offloading([], [smf.DISPATCHED]), 1),
    "rows_offloaded": (offloading([smf.DISPATCHED], [smf.DISPATCHED_ROWS]), 1),
}


def layer(api: Any, output: str, x: Any, topk_idx: Any, weights: Any, matrix: Any) -> Any:
    """Experts that are nonlinear, so that their gradient needs what was received."""
    recv = api.buffer.dispatch(x, topk_idx, weights, output=output)
    y = jnp.tanh(jnp.sin(recv.x) @ matrix)
    row_weights = recv.weights if output == "experts" else recv.topk_weights.sum(1)
    return api.buffer.combine(y, recv.layout, weights=row_weights)


SPECS = (P("ep"), P("ep"), P("ep"), P())


def gradient_of(run: Any, mesh: Mesh, policy: Any) -> Any:
    mapped = jax.shard_map(run, mesh=mesh, in_specs=SPECS, out_specs=P("ep"))
    checkpointed = jax.checkpoint(mapped, policy=policy)
    loss = lambda *args: jnp.sum(jnp.sin(checkpointed(*args)))  # noqa: E731
    return jax.jit(jax.grad(loss, (0, 2, 3)))


def inputs(config: smf.Config) -> list[Any]:
    arrays = sample_inputs.make_inputs(config, seed=3)
    shape = (config.hidden, config.hidden)
    matrix = np.random.default_rng(4).normal(size=shape).astype(np.float32)
    return [*(a.reshape(-1, a.shape[-1]) for a in arrays), matrix]


def check_counts(counts: dict[str, int], num_dispatches: int) -> None:
    assert counts["dispatch_send"] == num_dispatches, counts
    recvs = counts.get("dispatch_recv", 0) + counts.get("dispatch_recv_tokens", 0)
    assert recvs == num_dispatches, counts
    assert counts["combine_send"] == 1, "expected one combine: its gradient repeats none"


@pytest.mark.parametrize("output", ["experts", "tokens"])
@pytest.mark.parametrize("name", POLICIES)
def test_dispatches_of_a_gradient(name: str, output: str) -> None:
    policy, num_dispatches = POLICIES[name]
    mesh = support.mesh_of(CONFIG.ep_size)
    step, reference = (
        gradient_of(functools.partial(layer, api, output), mesh, policy)
        for api in support.apis(CONFIG)
    )
    args = inputs(CONFIG)
    check_counts(smf.inspect(step.lower(*args).compile()).counts, num_dispatches)
    support.assert_close(step(*args), reference(*args), 1e-4)


# ----------------------------------------------------------------------------- for described GPUs


def compile_for_gpus(run: Any, policy: Any) -> tuple[smf.Config, Any]:
    """Sizes, and the gradient of run(api, x, topk_idx, weights, matrix) compiled for H200s."""
    mesh = aot.mesh(num_gpus=AOT_RANKS)
    config = dataclasses.replace(
        CONFIG, ep_size=AOT_RANKS, num_experts=2 * AOT_RANKS, recv_capacity=None
    )
    api = support.Api(support.open_buffer(config, mesh), smf)
    placed = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
        for a, spec in zip(inputs(config), SPECS, strict=True)
    ]
    step = gradient_of(functools.partial(run, api), mesh, policy)
    return config, step.lower(*placed).compile()


@functools.cache
def layer_for_gpus(name: str) -> tuple[smf.Config, Any]:
    return compile_for_gpus(lambda api, *args: layer(api, "experts", *args), POLICIES[name][0])


@pytest.mark.parametrize("name", POLICIES)
def test_dispatches_of_a_gradient_on_gpus(name: str) -> None:
    schedule = smf.inspect(layer_for_gpus(name)[1])
    check_counts(schedule.counts, POLICIES[name][1])
    assert not schedule.unmatched, str(schedule)
    assert not schedule.repeated, str(schedule)


def on_the_host(compiled: Any) -> set[str]:
    """Types of the arrays of a compiled program that are in the host's memory."""
    return set(re.findall(r"(\w+\[[\d,]+\])\{[^}]*S\(5\)\}", compiled.as_text()))


def test_what_is_offloaded() -> None:
    """Of all that a dispatch receives, or of its rows alone."""
    config, rows_alone = layer_for_gpus("rows_offloaded")
    rows = f"f32[{config.recv_capacity},{config.hidden}]"
    assert on_the_host(rows_alone) == {rows}
    _, everything = layer_for_gpus("offloaded")
    assert on_the_host(everything) == {
        rows,
        f"f32[{config.recv_capacity}]",
        f"s32[{config.max_recv_tokens},{config.top_k}]",
        f"s32[{config.ep_size}]",
    }
    _, saved = layer_for_gpus("dispatched")
    assert not on_the_host(saved)


def test_a_saved_token_is_seen_to_be_received_twice() -> None:
    """The compiled program already shows what would be a fault when it runs."""

    def token_named(api: Any, x: Any, topk_idx: Any, weights: Any, matrix: Any) -> Any:
        sent = api.buffer.dispatch_send(x, topk_idx, weights)
        sent = dataclasses.replace(sent, token=checkpoint_name(sent.token, "token"))
        recv = api.buffer.dispatch_recv(sent)
        y = jnp.tanh(jnp.sin(recv.x) @ matrix)
        return api.buffer.combine(y, recv.layout, weights=recv.weights)

    _, compiled = compile_for_gpus(token_named, policies.save_only_these_names("token"))
    schedule = smf.inspect(compiled)
    assert schedule.counts["dispatch_send"] == 1
    assert schedule.counts["dispatch_recv"] == 2
    assert schedule.repeated, str(schedule)
