"""The example with two microbatches: its numbers, and what XLA makes of it for GPUs."""

from __future__ import annotations

import functools

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from support import P

import jax_sm_free as smf
from examples import two_microbatches as example

RANKS, BATCH, SEQUENCE, HIDDEN, EXPERTS, TOP_K = support.SOME_RANKS, 1, 8, 16, 8, 2
TOKENS = BATCH * SEQUENCE
SIZES = {"hidden": HIDDEN, "num_experts": EXPERTS, "top_k": TOP_K, "max_tokens": TOKENS}
# Room for all: nothing is dropped.
CAPACITY = {"expert_capacity": RANKS * TOKENS}
BEFORE = functools.partial(example.attend_and_route, top_k=TOP_K)


def in_turn(buffer, params, a, b):
    return [example.shared_beside_dispatch(buffer, BEFORE, params, x) for x in (a, b)]


def interleaved(buffer, params, a, b):
    return example.interleave(buffer, BEFORE, params, (a,), (b,))


def with_remat(buffer, params, a, b):
    policy = jax.checkpoint_policies.save_only_these_names(smf.DISPATCHED)
    return jax.checkpoint(functools.partial(interleaved, buffer), policy=policy)(params, a, b)


@pytest.mark.long
def test_interleaving_changes_no_number():
    mesh = support.mesh_of(RANKS)
    params, specs = example.make_params(
        jax.random.key(0), HIDDEN, EXPERTS, 8, 8, num_heads=1, dtype=jnp.float32
    )
    shape = (2, RANKS * BATCH, SEQUENCE, HIDDEN)
    halves = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    with smf.Buffer(mesh, "ep", **SIZES, **CAPACITY, dtype=jnp.float32) as buffer:
        want, *others = (
            jax.device_get(
                example.step_of(functools.partial(block, buffer), mesh, specs)(params, *halves)
            )
            for block in (in_turn, interleaved, with_remat)
        )
    for got in others:
        support.assert_close(got, want, tolerance=1e-4)


@pytest.mark.parametrize("block", [interleaved, with_remat, in_turn])
def test_every_exchange_has_gemms_beside_it(block):
    """For described H200s: four exchanges forward, four backward, none of them bare.

    One microbatch after the other has bare ones.
    """
    mesh = aot.mesh()
    hidden, width = 256, 256  # wide enough that XLA makes GEMMs of the products
    sizes = SIZES | {"hidden": hidden, "max_tokens": 128, "num_experts": 16}
    buffer = smf.Buffer(mesh, "ep", **sizes, expert_capacity=256)
    params, specs = example.make_params(
        jax.random.key(0), hidden, 16, width, width, num_heads=2, dtype=jnp.bfloat16
    )

    def loss(params, a, b):
        out = block(buffer, params, a, b)
        return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in out)

    def grads(params, a, b):
        return jax.grad(loss, argnums=(0, 1, 2))(params, a, b)

    x = jax.ShapeDtypeStruct((mesh.size, 128, hidden), jnp.bfloat16)
    compiled = aot.compile_for(
        mesh, grads, (specs, P("ep"), P("ep")), (P("ep"), P("ep"), P("ep")), params, x, x
    )
    schedule = smf.inspect(compiled)
    assert not schedule.unmatched
    assert not schedule.repeated
    assert [pair.send.op for pair in schedule.pairs].count("dispatch_send") == 2
    assert len(schedule.pairs) == 8
    bare = [str(pair.send) for pair in schedule.pairs if not pair.gemms]
    assert bool(bare) == (block is in_turn), schedule
