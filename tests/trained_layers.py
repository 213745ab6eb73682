"""Layers that tests train, and what programs put around them: remat, scan, and both.

The experts are nonlinear, so that the gradient of a layer needs its forward pass.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def plain_layer(api, x, topk_idx, weights, matrix):
    recv = api.buffer.dispatch(x, topk_idx, weights)
    y = jnp.tanh(recv.x @ matrix)
    return api.buffer.combine(y, recv.layout, weights=recv.weights)


def overlapped_layer(api, x, topk_idx, weights, matrix):
    sent = api.buffer.dispatch_send(x, topk_idx, weights)
    shared, sent = api.overlap(sent, lambda x, m: jnp.sin(x @ m), x, matrix)
    recv = api.buffer.dispatch_recv(sent)
    y = jnp.tanh(recv.x @ matrix)
    sent = api.buffer.combine_send(y, recv.layout, recv.weights)
    shared, sent = api.overlap(sent, jnp.cos, shared)
    return api.buffer.combine_recv(sent) + shared


def layer_by_tokens(api, x, topk_idx, weights, matrix):
    """Weights enter before the plain sum, so that their gradient comes back with the dispatch."""
    recv = api.buffer.dispatch(x, topk_idx, weights, output="tokens")
    y = jnp.tanh(recv.x @ matrix) * recv.topk_weights.sum(axis=1, keepdims=True)
    return api.buffer.combine(y, recv.layout)


def layer_that_uses_weights_early(api, x, topk_idx, weights, matrix):
    recv = api.buffer.dispatch(x, topk_idx, weights)
    y = jnp.tanh((recv.x * recv.weights[:, None]) @ matrix)
    return api.buffer.combine(y, recv.layout)


LAYERS = [plain_layer, overlapped_layer, layer_by_tokens, layer_that_uses_weights_early]


# What is done with the layer.


def loss_of(out):
    return (out * jnp.arange(1.0, 8.0)).sum() + (out**2).sum()


def gradients(wrap, layer, api, x, topk_idx, weights, matrix):
    def loss(x, weights, matrix):
        return loss_of(wrap(layer, api)(x, topk_idx, weights, matrix))

    return jax.value_and_grad(loss, (0, 1, 2))(x, weights, matrix)


def alone(layer, api):
    return functools.partial(layer, api)


def in_checkpoint(layer, api):
    return jax.checkpoint(functools.partial(layer, api))


def in_scan(layer, api):
    def layers(x, topk_idx, weights, matrix):
        factors = jnp.array([0.5, -0.3, 0.2])

        def step(x, factor):
            return x + layer(api, x, topk_idx, weights * factor, matrix), None

        return jax.lax.scan(step, x, factors)[0]

    return layers


def in_scan_and_checkpoint(layer, api):
    return in_scan(lambda api, *args: jax.checkpoint(functools.partial(layer, api))(*args), api)
