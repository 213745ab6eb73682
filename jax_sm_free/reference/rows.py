"""Taking rows, and summing rows in a fixed order."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def take_rows(x: Array, rows: Array) -> Array:
    """x[rows], where a row of -1 gives bytes of zero.

    Bytes of zero, because a dtype of scales may have no number zero.
    """
    if x.shape[0] == 0:
        x = jnp.zeros((1, *x.shape[1:]), x.dtype)
        rows = jnp.full_like(rows, -1)
    # A negative index would count from the end. An index past the end is filled.
    rows = jnp.where(rows < 0, x.shape[0], rows)
    zero = np.zeros(x.dtype.itemsize, np.uint8).view(x.dtype)[0]
    return jnp.take(x, rows, axis=0, mode="fill", fill_value=zero)


def sum_in_order(addends: Array) -> Array:
    """Sums over the first axis of [N, ...] in float32, from first to last, starting at +0.

    The sum is a loop for three reasons. XLA keeps the order of a loop. XLA cannot contract a
    product that made the addends with a sum inside of a loop, which would skip a rounding. And XLA
    drops a cast to a narrow dtype and back, but not where the way back is inside of a loop. (An
    optimization_barrier would not do: XLA may expand it before it fuses. XLA does inline a loop of
    one turn, but the first sum is exact.) An absent row is a zero, which changes no sum that began
    at +0.
    """
    zero = jnp.zeros_like(addends, shape=addends.shape[1:], dtype=jnp.float32)
    return lax.scan(lambda total, addend: (total + addend.astype(zero.dtype), None), zero, addends)[
        0
    ]


def reduce_rows(y: Array, rows: Array, weights: Array | None) -> Array:
    """[R, H]: for each token row the sum of `weights * y` over its rows, in y's dtype."""
    values = y.astype(jnp.float32)
    if weights is not None:
        values = weights[:, None] * values
    return sum_in_order(take_rows(values, rows.T)).astype(y.dtype)


def sum_by_node(addends: Array, num_nodes: int, node_stride: int) -> Array:
    """Sums over the ranks of each node in rank order, and over these sums in node order.

    Args:
      addends: [ep_size, ...], by rank.
      num_nodes: as in `Config`.
      node_stride: as in `Config`.

    Returns:
      [...], of the same dtype. Each sum is in float32 and cast once.
    """
    if num_nodes == 1:
        return _sum_and_cast(addends)
    ep_size, *shape = addends.shape
    outer = ep_size // (num_nodes * node_stride)
    by_node = jnp.moveaxis(addends.reshape(outer, num_nodes, node_stride, *shape), 1, 2)
    by_node = by_node.reshape(outer * node_stride, num_nodes, *shape)
    return _sum_and_cast(_sum_and_cast(by_node))


def _sum_and_cast(addends: Array) -> Array:
    return sum_in_order(addends).astype(addends.dtype)
