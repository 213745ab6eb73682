"""The forms in which a dispatch and a combine are received."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jax_sm_free import autodiff
from jax_sm_free.pending import Sent
from jax_sm_free.primitives import BufferRef, RowType
from jax_sm_free.results import Layout, Received, ReceivedTokens


def by_expert(ref: BufferRef, sent: Sent) -> Received:
    values, scales, group_sizes, counts, weights, dropped, rows, num_rows_from = (
        autodiff.dispatch_recv(ref, sent.row_type, sent.token, *_own_rows(sent))
    )
    return Received(
        x=(values, scales) if sent.row_type.has_scales else values,
        group_sizes=plain(group_sizes),
        counts=plain(counts),
        weights=weights,
        dropped=plain(dropped),
        layout=_layout(sent, rows, num_rows_from, "experts"),
        expert_capacity=ref.config.expert_capacity,
    )


def by_token(ref: BufferRef, sent: Sent) -> ReceivedTokens:
    values, scales, topk_idx, topk_weights, counts, num_tokens, rows, num_rows_from = (
        autodiff.dispatch_recv_tokens(ref, sent.row_type, sent.token, *_own_rows(sent))
    )
    return ReceivedTokens(
        x=(values, scales) if sent.row_type.has_scales else values,
        topk_idx=plain(topk_idx),
        topk_weights=topk_weights,
        counts=plain(counts),
        num_tokens=plain(num_tokens),
        layout=_layout(sent, rows, num_rows_from, "tokens"),
    )


def sums(ref: BufferRef, sent: Sent) -> Array:
    # A Sent has no empty arrays, because JAX 0.11.2 crashes where a shard_map takes one.
    y, rows, num_rows_from, *weights = sent.own_rows
    weights = weights or [autodiff.no_weights(y)]
    own_rows = (y, *weights, rows, num_rows_from)
    return autodiff.combine_recv(ref, sent.token, sent.topk_idx, *own_rows)


def no_scales(values: Array, row_type: RowType) -> Array:
    """[T, 0], beside values [T, columns]."""
    return jax.lax.stop_gradient(values[:, :0]).astype(row_type.scale_dtype)


def _layout(sent: Sent, rows: Array, num_rows_from: Array, output: str) -> Layout:
    return Layout(sent.topk_idx, plain(rows), plain(num_rows_from), output, sent.node_topk)


def plain(integers: Array) -> Array:
    """The same integers, whose gradient JAX does not track.

    JAX tracks the gradient of all results of a rule for gradients, integers too. With a mesh axis
    as `spmd_axis_name` it then gets the types of integers wrong. An operation on integers ends the
    tracking.
    """
    return integers | 0


def _own_rows(sent: Sent) -> tuple[Array, Array]:
    """Values and scales of a dispatch. Both have no rows where its recv needs none."""
    values, *scales = sent.own_rows or (
        jnp.broadcast_to(sent.topk_idx[:0, :1], (0, sent.row_type.columns)).astype(
            sent.row_type.dtype
        ),
    )
    return values, scales[0] if scales else no_scales(values, sent.row_type)
