"""The same peer with `lax.ragged_all_to_all`: only rows that are there travel.

A message is cut into `num_updates` parts: XLA's one-shot kernel copies each part with as many
blocks as it takes, and moves few bytes at a time where parts are few.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks.pure_jax import PureJax


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchange(axis: str, num_updates: int, rows: Array, sent: Array, received: Array) -> Array:
    """Sends the first sent[r] rows of message r to rank r; rows [ep_size * capacity, H].

    Returns [ep_size * capacity, H], of which the first received[r] rows of message r are set.
    """
    ep_size = sent.shape[0]
    capacity = rows.shape[0] // ep_size
    part = -(-capacity // num_updates)
    # Parts past the end are empty, and begin no later than that.
    begin = jnp.minimum(part * jnp.arange(num_updates, dtype=jnp.int32), capacity)
    first = capacity * jnp.arange(ep_size, dtype=jnp.int32)
    own = capacity * lax.axis_index(axis).astype(jnp.int32)

    def sizes(counts: Array) -> Array:
        return jnp.clip(counts[:, None] - begin, 0, part).reshape(-1)

    return lax.ragged_all_to_all(
        rows,
        lax.empty(rows.shape, rows.dtype),
        (first[:, None] + begin).reshape(-1),
        sizes(sent),
        jnp.tile(own + begin, ep_size),
        sizes(received),
        axis_name=axis,
    )


def _exchange_fwd(axis: str, num_updates: int, rows: Array, sent: Array, received: Array) -> tuple:
    return _exchange(axis, num_updates, rows, sent, received), (sent, received)


def _exchange_bwd(axis: str, num_updates: int, counts: tuple[Array, Array], ct: Array) -> tuple:
    sent, received = counts
    none = np.zeros(sent.shape, jax.dtypes.float0)
    return _exchange(axis, num_updates, ct, received, sent), none, none


_exchange.defvjp(_exchange_fwd, _exchange_bwd)


@dataclasses.dataclass(frozen=True)
class Ragged(PureJax):
    """Expert parallelism over a mesh axis, inside `jax.shard_map`."""

    num_updates: int = 1

    def _exchange(self, rows: Array, num_sent: Array, num_received: Array) -> Array:
        return _exchange(self.axis, self.num_updates, rows, num_sent, num_received)
