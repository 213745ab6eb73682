"""Grouped matrix products by `jax.lax.ragged_dot`, which runs anywhere."""

from __future__ import annotations

import jax
from jax import Array


def product(rows: Array, weights: Array, group_sizes: Array) -> Array:
    """From rows [M, A] and weights [E, A, B]: [M, B]."""
    return jax.lax.ragged_dot(rows, weights, group_sizes)


def rows_grad(grads: Array, weights: Array, group_sizes: Array) -> Array:
    """From grads [M, B] and weights [E, A, B]: [M, A]."""
    return jax.lax.ragged_dot(grads, weights.swapaxes(1, 2), group_sizes)


def weights_grad(rows: Array, grads: Array, weights: Array, group_sizes: Array) -> Array:
    """From rows [M, A] and grads [M, B]: [E, A, B]."""
    _, transpose = jax.vjp(lambda w: jax.lax.ragged_dot(rows, w, group_sizes), weights)
    return transpose(grads)[0]
