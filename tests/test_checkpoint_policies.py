"""How often a layer under `jax.checkpoint` dispatches, by the policy."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from support import P

import jax_sm_free as smf

CONFIG = support.make_config(num_experts=2 * support.SOME_RANKS, num_slots=4)
HIDDEN = CONFIG.hidden
policies = jax.checkpoint_policies

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
}


def layer(api: Any, output: str, x: Any, topk_idx: Any, weights: Any, matrix: Any) -> Any:
    """Experts that are nonlinear, so that their gradient needs what was received."""
    recv = api.buffer.dispatch(x, topk_idx, weights, output=output)
    y = jnp.tanh(jnp.sin(recv.x) @ matrix)
    row_weights = recv.weights if output == "experts" else recv.topk_weights.sum(1)
    return api.buffer.combine(y, recv.layout, weights=row_weights)


def gradient_of(api: Any, output: str, policy: Any) -> Any:
    mapped = jax.shard_map(
        functools.partial(layer, api, output),
        mesh=support.mesh_of(CONFIG.ep_size),
        in_specs=(P("ep"), P("ep"), P("ep"), P()),
        out_specs=P("ep"),
    )
    checkpointed = jax.checkpoint(mapped, policy=policy)
    loss = lambda *args: jnp.sum(jnp.sin(checkpointed(*args)))  # noqa: E731
    return jax.jit(jax.grad(loss, (0, 2, 3)))


def inputs() -> list[Any]:
    arrays = support.make_inputs(CONFIG, seed=3)
    matrix = np.random.default_rng(4).normal(size=(HIDDEN, HIDDEN)).astype(np.float32)
    return [*(a.reshape(-1, a.shape[-1]) for a in arrays), matrix]


@pytest.mark.parametrize("output", ["experts", "tokens"])
@pytest.mark.parametrize("name", POLICIES)
def test_dispatches_of_a_gradient(name: str, output: str) -> None:
    policy, num_dispatches = POLICIES[name]
    api, reference = support.apis(CONFIG)
    step = gradient_of(api, output, policy)
    counts = smf.inspect(step.lower(*inputs()).compile()).counts
    assert counts["dispatch_send"] == num_dispatches, counts
    recvs = counts.get("dispatch_recv", 0) + counts.get("dispatch_recv_tokens", 0)
    assert recvs == num_dispatches, counts
    assert counts["combine_send"] == 1, "a combine is never repeated for its gradient"
    want = gradient_of(reference, output, policy)(*inputs())
    support.assert_close(step(*inputs()), want, 1e-4)
