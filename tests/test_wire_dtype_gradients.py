"""Gradients over a float8 wire: they pass it unchanged."""

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

pytestmark = pytest.mark.long

CONFIG = make_config(wire_dtype=jnp.float8_e4m3fn, num_experts=2 * support.SOME_RANKS)


def linear_gradients(output, api, x, topk_idx, weights, cotangent):
    """Of a loss that is linear in the rows: the same whatever their values."""

    def loss(x, weights):
        recv = api.buffer.dispatch(x, topk_idx, weights, output=output)
        grad = recv.topk_weights if output == "tokens" else recv.weights
        return (recv.x * cotangent).astype(jnp.float32).sum() + (grad**2).sum()

    return jax.grad(loss, (0, 1))(x, weights)


by_output = {
    output: functools.partial(linear_gradients, output) for output in ("experts", "tokens")
}


@pytest.mark.one_process
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("output", ["experts", "tokens"])
def test_the_gradient_passes_the_wire_unchanged(dtype, output):
    """The same bits as without a wire_dtype, in the buffer's dtype."""
    config = dataclasses.replace(CONFIG, dtype=dtype, hidden=200)
    num_rows = config.recv_capacity if output == "experts" else config.max_recv_tokens
    inputs = make_inputs(config, seed=12)
    cotangent = make_rows(config, num_rows, 13)
    ours, theirs = support.runners(config, by_output[output])
    exact, _ = support.runners(dataclasses.replace(config, wire_dtype=None), by_output[output])
    got = ours(*inputs, cotangent)
    assert got[0].dtype == dtype
    assert np.asarray(got[0]).any()
    support.assert_same_bits(got, exact(*inputs, cotangent))
    support.assert_close(got, theirs(*inputs, cotangent), 1e-2 if dtype != jnp.float32 else 1e-5)


matmul = functools.partial(jnp.matmul, precision="highest")


def layer(api, x, topk_idx, weights, matrix):
    sent = api.buffer.dispatch_send(x, topk_idx, weights)
    shared, sent = api.overlap(sent, lambda x, m: jnp.sin(matmul(x, m)), x, matrix)
    recv = api.buffer.dispatch_recv(sent)
    y = jnp.tanh(matmul(recv.x, matrix))
    return api.buffer.combine(y, recv.layout, weights=recv.weights) + shared


def alone(api):
    return functools.partial(layer, api)


def in_scan_and_checkpoint(api):
    def layers(x, topk_idx, weights, matrix):
        def step(x, factor):
            return x + jax.checkpoint(alone(api))(x, topk_idx, weights * factor, matrix), None

        return jax.lax.scan(step, x, jnp.array([0.5, -0.3, 0.2]))[0]

    return layers


def gradients(wrap, api, *inputs):
    def loss(x, weights, matrix):
        return (wrap(api)(x, inputs[1], weights, matrix) ** 2).sum()

    return jax.value_and_grad(loss, (0, 1, 2))(inputs[0], inputs[2], inputs[3])


PROGRAMS = {wrap: functools.partial(gradients, wrap) for wrap in (alone, in_scan_and_checkpoint)}


@pytest.mark.parametrize("wrap", PROGRAMS)
def test_gradients_of_a_layer(wrap):
    """Against the reference, whose gradient passes its quantisation straight through, too."""
    config = dataclasses.replace(CONFIG, dtype=jnp.float32, hidden=40, num_slots=4)
    matrix = np.random.default_rng(14).normal(size=(config.ep_size, 40, 40)).astype(np.float32) / 6
    ours, theirs = support.runners(config, PROGRAMS[wrap])
    inputs = *make_inputs(config, seed=15), matrix
    got = ours(*inputs)
    # Where sums before a quantisation differ in their last bit, a value may take its other
    # neighbour: only the layer alone is as close as its sums.
    support.assert_close(got, theirs(*inputs), 1e-4 if wrap is alone else 2e-2)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(got))
