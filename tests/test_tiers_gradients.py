"""Gradients through two tiers: alone, in a scan, under checkpoint, and both."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from sample_inputs import make_inputs, make_rows
from support import make_config
from test_checkpoint_policies import POLICIES
from trained_layers import (
    LAYERS,
    alone,
    gradients,
    in_checkpoint,
    in_scan,
    in_scan_and_checkpoint,
    overlapped_layer,
)

import jax_sm_free as smf

pytestmark = pytest.mark.skipif(support.MAX_RANKS < 2, reason="needs two devices")

NUM_RANKS = support.MAX_RANKS
CONFIG = make_config(NUM_RANKS, num_nodes=min(2, NUM_RANKS), num_experts=2 * NUM_RANKS, num_slots=4)


def forwarded_layer(api, x, topk_idx, weights, matrix):
    """Compute between each send and its forward, and between each forward and its recv."""
    buffer = api.buffer

    def times_matrix(x, matrix):
        return jnp.sin(x @ matrix)

    sent = buffer.dispatch_send(x, topk_idx, weights)
    shared, sent = api.overlap(sent, times_matrix, x, matrix)
    sent = buffer.dispatch_forward(sent)
    shared, sent = api.overlap(sent, times_matrix, shared, matrix)
    recv = buffer.dispatch_recv(sent)
    y = jnp.tanh(recv.x @ matrix)
    sent = buffer.combine_send(y, recv.layout, recv.weights)
    shared, sent = api.overlap(sent, times_matrix, shared, matrix)
    sent = buffer.combine_forward(sent)
    shared, sent = api.overlap(sent, jnp.cos, shared)
    return buffer.combine_recv(sent) + shared


@functools.cache
def program_of(wrap, layer):
    return functools.partial(gradients, wrap, layer)


def inputs_of(config, **kwargs):
    matrix = np.random.default_rng(2).normal(size=(config.ep_size, 7, 7)).astype(np.float32)
    return *make_inputs(config, seed=1, **kwargs), matrix


def check(config, wrap, layer, inputs, tolerance=1e-4, **kwargs):
    ours, theirs = support.runners(config, program_of(wrap, layer), **kwargs)
    got = ours(*inputs)
    support.assert_close(got, theirs(*inputs), tolerance)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(got))
    return got


CASES = [(alone, layer) for layer in LAYERS]
CASES += [
    (wrap, forwarded_layer) for wrap in (alone, in_checkpoint, in_scan, in_scan_and_checkpoint)
]
CASES += [(in_scan_and_checkpoint, overlapped_layer)]


@pytest.mark.parametrize(("wrap", "layer"), CASES)
def test_gradients(wrap, layer):
    check(CONFIG, wrap, layer, inputs_of(CONFIG))


@pytest.mark.parametrize("num_nodes", [n for n in support.EP_SIZES if n > 2])
@pytest.mark.parametrize("stride", [1, None])
def test_gradients_of_more_nodes(num_nodes, stride):
    config = dataclasses.replace(CONFIG, num_nodes=num_nodes, node_stride=stride)
    check(config, alone, forwarded_layer, inputs_of(config))


CHANGES = {
    "cut": {"recv_capacity": 11, "expert_alignment": 2},
    "expert_capacity": {"expert_capacity": 3, "recv_capacity": None},
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("check_vma", [False, True])
def test_gradients_with_dropped_and_padding_rows(name, check_vma):
    config = dataclasses.replace(CONFIG, **CHANGES[name])
    check(config, alone, forwarded_layer, inputs_of(config), check_vma=check_vma)


def test_gradients_of_half_precision():
    dtype = jnp.bfloat16
    config = dataclasses.replace(CONFIG, dtype=dtype)
    x, topk_idx, weights, matrix = inputs_of(config)
    inputs = x.astype(dtype), topk_idx, weights, (matrix / 4).astype(dtype)
    check(config, alone, forwarded_layer, inputs, tolerance=0.05)


@pytest.mark.parametrize("num_tokens", [support.NO_TOKENS, 1])
def test_gradients_of_few_tokens(num_tokens):
    inputs = inputs_of(CONFIG, num_tokens=num_tokens)
    ours, theirs = support.runners(CONFIG, program_of(alone, forwarded_layer))
    support.assert_close(ours(*inputs), theirs(*inputs), 1e-4)


@pytest.mark.parametrize("how", ["nobody_sends", "one_rank_sends_nothing", "all_to_one_expert"])
def test_gradients_of_routings(how):
    inputs = inputs_of(CONFIG, how=how)
    ours, theirs = support.runners(CONFIG, program_of(alone, forwarded_layer))
    support.assert_close(ours(*inputs), theirs(*inputs), 1e-4)


# --------------------------------------------------------------------------------------- rounding


def mirrored(api, x, topk_idx, weights, y):
    """The gradients of a dispatch and of a combine, and what the mirrored ops give."""
    buffer = api.buffer

    def dispatched(x):
        recv = buffer.dispatch(x, topk_idx, weights)
        return recv.x, recv.layout

    (_, of_dispatch, layout) = jax.vjp(dispatched, x, has_aux=True)
    combined, of_combine = jax.vjp(lambda y: buffer.combine(y, layout), y)
    arrived = buffer.dispatch(combined, topk_idx, weights)
    return (of_dispatch(y)[0], of_combine(combined)[0]), (combined, arrived.x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_are_rounded_as_the_mirrored_ops(dtype):
    """A dispatch's gradient is a combine of the cotangent, and a combine's is a dispatch of it."""
    config = dataclasses.replace(CONFIG, dtype=dtype, num_experts=4 * NUM_RANKS, top_k=8)
    config = dataclasses.replace(config, recv_capacity=None)
    y = make_rows(config, config.recv_capacity, 5)
    got, want = support.runners(config, mirrored)[0](*make_inputs(config), y)
    support.assert_same_bits(got, want)


# ------------------------------------------------------------------------------ other forms of rows


def float8_gradients(output, api, x, topk_idx, weights, matrix):
    def loss(x, weights):
        recv = api.buffer.dispatch(x, topk_idx, weights, output=output)
        grad = recv.topk_weights if output == "tokens" else recv.weights
        return (recv.x @ matrix).sum() + (grad**2).sum()

    return jax.grad(loss, (0, 1))(x, weights)


BY_OUTPUT = {
    output: functools.partial(float8_gradients, output) for output in ("experts", "tokens")
}


@pytest.mark.parametrize("output", BY_OUTPUT)
def test_gradients_over_a_float8_wire(output):
    config = dataclasses.replace(CONFIG, wire_dtype=jnp.float8_e4m3fn)
    ours, theirs = support.runners(config, BY_OUTPUT[output])
    inputs = inputs_of(config)
    support.assert_close(ours(*inputs), theirs(*inputs), 1e-4)


def weight_gradient(api, x, topk_idx, weights, matrix):
    """Of rows that have no gradient, so that a rail carries gradients of weights alone."""
    values, scales = x[:, :3], x[:, 3:4]

    def loss(weights):
        recv = api.buffer.dispatch((values, scales), topk_idx, weights)
        rows = jnp.concatenate([*recv.x, recv.x[0]], axis=1) @ matrix
        return api.buffer.combine(rows, recv.layout, weights=recv.weights).sum()

    return jax.grad(loss)(weights)


def test_weights_have_gradients_beside_values_and_scales():
    ours, theirs = support.runners(CONFIG, weight_gradient)
    inputs = inputs_of(CONFIG)
    got = ours(*inputs)
    assert np.asarray(got).any()
    support.assert_close(got, theirs(*inputs), 1e-4)


# -------------------------------------------------------------------------------------- checkpoint


@pytest.mark.parametrize("name", POLICIES)
def test_dispatches_of_a_gradient(name):
    """A policy that saves what a dispatch received saves its forward from being repeated, too."""
    policy, num_dispatches = POLICIES[name]

    def wrap(layer, api):
        return jax.checkpoint(functools.partial(layer, api), policy=policy)

    mesh, inputs = support.mesh_for(CONFIG), inputs_of(CONFIG)
    ours, theirs = (
        support.on_ranks(functools.partial(gradients, wrap, forwarded_layer, api), mesh)
        for api in support.apis(CONFIG)
    )
    counts = smf.inspect(ours.lower(*inputs).compile()).counts
    for part in ("send", "forward", "recv"):
        assert counts[f"dispatch_{part}"] == num_dispatches, counts
        assert counts[f"combine_{part}"] == 1, counts
        assert counts[f"dispatch_backward_{part}"] == counts[f"combine_backward_{part}"] == 1
    support.assert_close(ours(*inputs), theirs(*inputs), 1e-4)
