"""Thousands of exchanges in a row: slots used again, other routing each time, bit by bit."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import sample_inputs
import sample_programs
import support

import jax_sm_free as smf
from jax_sm_free import reference

pytestmark = pytest.mark.long

CONFIG = support.make_config(
    support.MAX_RANKS,
    hidden=5,
    num_experts=2 * support.MAX_RANKS,
    top_k=2,
    max_tokens=4,
    recv_capacity=20,
    expert_alignment=2,
)
STEPS = 125
ROUNDS = 4
EXCHANGES_PER_STEP = 4


def step(api, x, routing):
    """Two dispatches, then two combines, each two in flight together. Sums of one row each."""
    buffer = api.buffer
    (idx_a, idx_b), (weights_a, weights_b) = routing
    dispatch_a = buffer.dispatch_send(x, idx_a, weights_a)
    x_b, dispatch_a = sample_programs.after(-x, dispatch_a)
    dispatch_b = buffer.dispatch_send(x_b, idx_b, weights_b)
    b = buffer.dispatch_recv(dispatch_b)
    x_b, dispatch_a = sample_programs.after(b.x, dispatch_a)
    a = buffer.dispatch_recv(dispatch_a)

    combine_a = buffer.combine_send(a.x, a.layout, a.weights)
    x_b, combine_a = sample_programs.after(x_b, combine_a)
    combine_b = buffer.combine_send(x_b, b.layout)
    out_a = buffer.combine_recv(combine_a)
    out_b = buffer.combine_recv(combine_b)
    return x, (a, b, out_a, out_b)


def many_steps(api, x, idx, weights):
    return jax.lax.scan(functools.partial(step, api), x, (idx, weights))[1]


def make_steps(seed):
    """Rows, and for each step the routing of two dispatches; every kind of routing among them."""
    kinds = sorted(sample_inputs.ROUTINGS)
    routing = [
        [
            sample_inputs.make_routing(
                CONFIG, CONFIG.max_tokens, seed + 2 * i + j, kinds[(i + j) % 10]
            )
            for j in (0, 1)
        ]
        for i in range(STEPS)
    ]
    idx, weights = (
        np.array([[pair[part] for pair in step] for step in routing]) for part in (0, 1)
    )
    by_rank = (2, 0, 1, 3, 4)
    x = sample_inputs.make_rows(CONFIG, CONFIG.max_tokens, seed)
    return x, idx.transpose(by_rank), weights.transpose(by_rank)


def test_two_thousand_exchanges_with_random_routing():
    assert STEPS * ROUNDS * EXCHANGES_PER_STEP >= 2000
    ours, theirs = (
        support.on_ranks(
            functools.partial(many_steps, support.Api(buffer, module)),
            support.mesh_of(CONFIG.ep_size),
        )
        for module, buffer in (
            (smf, support.apis(CONFIG)[0].buffer),
            (reference, support.apis(CONFIG)[1].buffer),
        )
    )
    for seed in range(ROUNDS):
        inputs = make_steps(1000 * seed)
        support.assert_same_bits(ours(*inputs), theirs(*inputs))
