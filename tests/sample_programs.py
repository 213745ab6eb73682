"""Programs of many tests: round trips and a layer, on the library or on the reference.

A program under test takes an `Api` first, so that it runs on either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_sm_free as smf
from jax_sm_free.config import Config

if (
    TYPE_CHECKING
):  # Ranks of tests import this module, and start faster without pytest and hypothesis.
    from support import Api


def round_trip(api: Api, x: Any, topk_idx: Any, topk_weights: Any, y: Any) -> Any:
    """Dispatch to experts, and a weighted combine of `y`, NaN in all rows of no token."""
    recv = api.buffer.dispatch(x, topk_idx, topk_weights)
    y = poison_unused(y, recv.layout)
    return recv, api.buffer.combine(y, recv.layout, weights=recv.weights)


def round_trip_tokens(api: Api, x: Any, topk_idx: Any, topk_weights: Any, y: Any) -> Any:
    """The same as `round_trip` with rows by tokens and a plain sum."""
    recv = api.buffer.dispatch(x, topk_idx, topk_weights, output="tokens")
    y = poison_unused(y, recv.layout)
    return recv, api.buffer.combine(y, recv.layout)


def layer(api: Api, x: Any, topk_idx: Any, topk_weights: Any, y: Any) -> Any:
    """Dispatch to experts that multiply their rows by y, and a weighted combine."""
    recv = api.buffer.dispatch(x, topk_idx, topk_weights)
    return api.buffer.combine(recv.x * y, recv.layout, weights=recv.weights)


def row_numbers(config: Config) -> np.ndarray:
    """The rows of x in `big_round_trip`, a number each: f32 [ep_size, max_tokens]."""
    size = config.ep_size * config.max_tokens
    return np.arange(size, dtype=np.float32).reshape(config.ep_size, config.max_tokens)


def big_round_trip(api: Api, topk_idx: Any, topk_weights: Any) -> Any:
    """Two columns of all rows received, their counts, and two columns of all sums.

    Rows are made where they are needed, so that not even the host's memory holds them all.
    """
    config = api.buffer.config
    rank = jax.lax.axis_index("ep").astype(jnp.float32)
    number = jnp.arange(config.max_tokens, dtype=jnp.float32) + rank * config.max_tokens
    x = jnp.broadcast_to(number[:, None], (config.max_tokens, config.hidden)).astype(config.dtype)
    recv = api.buffer.dispatch(x, topk_idx, topk_weights)
    columns = jnp.array([0, config.hidden - 1])
    out = api.buffer.combine(recv.x, recv.layout, weights=recv.weights)
    return recv.x[:, columns], recv.counts, out[:, columns]


def poison_unused(y: Any, layout: smf.Layout) -> Any:
    """NaN in every row of y that belongs to no token."""
    rows = jnp.where(layout.rows < 0, y.shape[0], layout.rows).reshape(-1)
    used = jnp.zeros(y.shape[:1], bool).at[rows].set(True, mode="drop")
    return jnp.where(used[:, None], y, jnp.asarray(jnp.nan, y.dtype))


def after(value: Any, sent: Any) -> tuple[Any, Any]:
    """`value`, finite, computed after the send; and `sent`, received after `value`.

    Data edges set the order, because XLA:CPU ignores the barriers of `overlap`. An edge adds zero,
    which changes only the sign of -0.0. The reference sends nothing, so there is nothing to order.
    """
    if not isinstance(sent, smf.Sent):
        return value, sent
    value = value + 0 * sent.token[0].astype(value.dtype)
    zero = 0 * value.astype(jnp.float32).sum()
    return value, dataclasses.replace(sent, token=sent.token + zero)


def num_rows(config: Config, program: Callable[..., Any]) -> int:
    """Rows of y in `round_trip` and `round_trip_tokens`."""
    return config.recv_capacity if program is round_trip else config.max_recv_tokens
