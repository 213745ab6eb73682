"""What the sends of `Buffer` do: check their operands, send, and keep this rank's own rows."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh

from jax_sm_free import autodiff, checks, receiving
from jax_sm_free.pending import Sent
from jax_sm_free.primitives import BufferRef, RowType
from jax_sm_free.results import Layout
from jax_sm_free.varying import vary_alike


def dispatch(
    ref: BufferRef,
    mesh: Mesh,
    axes: tuple[str, ...],
    x: Any,
    topk_idx: Array,
    topk_weights: Array,
) -> Sent:
    """Sends the rows of x. The operands are those of `Buffer.dispatch_send`."""
    op, config = "dispatch_send", ref.config
    row_type = checks.check_rows(op, config, x)
    values, *parts = x if isinstance(x, (tuple, list)) else (x,)
    checks.check_topk(op, config, values.shape[0], topk_idx, topk_weights)
    position = jax.lax.axis_index(checks.larger_axes(mesh) or axes)
    # Results of equal operands differ from rank to rank, but not from group to group.
    rank = jax.lax.axis_index(axes)
    _, values, topk_idx, topk_weights, *parts = vary_alike(
        rank, values, topk_idx, topk_weights, *parts
    )
    if parts:
        values, *parts = autodiff.no_gradient(values, *parts)
    scales = parts[0] if parts else receiving.no_scales(values, row_type)
    token = autodiff.dispatch_send(ref, row_type, values, scales, topk_idx, topk_weights, position)
    # A row that the wire quantises is quantised for this rank, too, and so travels through it.
    own_rows = () if config.wire.quantises else _without_gradient(values, *parts)
    return Sent(token, topk_idx, own_rows, "dispatch", row_type)


def combine(ref: BufferRef, y: Array, layout: Layout, weights: Array | None) -> Sent:
    """Sends the sums of the rows of y. The operands are those of `Buffer.combine_send`."""
    config = ref.config
    checks.check_combine(config, y, layout, weights)
    arrays, tree = jax.tree.flatten((y, layout, weights))
    y, layout, weights = jax.tree.unflatten(tree, vary_alike(*arrays))
    token = autodiff.combine_send(ref, y, weights, layout.rows, layout.num_rows_from)
    present = () if weights is None else (weights,)
    own_rows = _without_gradient(y, layout.rows, layout.num_rows_from, *present)
    row_type = RowType(config.hidden, config.dtype)
    return Sent(token, layout.topk_idx, own_rows, "combine", row_type, layout.node_topk)


def _without_gradient(*arrays: Array) -> tuple[Array, ...]:
    return tuple(map(jax.lax.stop_gradient, arrays))
