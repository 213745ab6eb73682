"""The peer: expert parallelism as it is written well in JAX without custom calls.

Messages are padded to a static capacity for each (source, destination), travel by
`lax.all_to_all`, and are grouped by expert with a sort and a gather. As in `jax_sm_free`, a token
travels once to a rank, however many of its experts live there. Rows are only ever gathered,
backwards too: XLA:CPU scatters rows ten times slower than it gathers them.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


class Handle(NamedTuple):
    """Where the rows of a dispatch lie; an index past the end says nowhere.

    Attributes:
      slot: i32 [T, ep_size], the slot of each token in the messages to each rank.
      token: i32 [ep_size * pair_capacity], the token in each slot.
      place: i32 [ep_size * pair_capacity, K], the expert rows of each slot received.
      source: i32 [recv_capacity], the slot of each expert row.
    """

    slot: Array
    token: Array
    place: Array
    source: Array


class Grouped(NamedTuple):
    """As `jax_sm_free.Received`; `overflow`, i32 [1], counts rows that found no place."""

    x: Array
    group_sizes: Array
    weights: Array
    overflow: Array
    handle: Handle


@jax.custom_vjp
def _spread(x: Array, source: Array, targets: Array) -> Array:
    """x[source], where row i of x goes to the rows targets[i]: each undoes the other."""
    del targets
    return x.at[source].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _collect(x: Array, targets: Array, source: Array) -> Array:
    """Row i is the sum of x[targets[i]]; summed in float32."""
    del source
    columns = [
        x.at[targets[:, i]].get(mode="fill", fill_value=0).astype(jnp.float32)
        for i in range(targets.shape[1])
    ]
    return sum(columns[1:], columns[0]).astype(x.dtype)


def _no_gradient(indices: Array) -> np.ndarray:
    return np.zeros(indices.shape, jax.dtypes.float0)


def _spread_bwd(indices: tuple[Array, Array], ct: Array) -> tuple:
    source, targets = indices
    return _collect(ct, targets, source), _no_gradient(source), _no_gradient(targets)


def _collect_bwd(indices: tuple[Array, Array], ct: Array) -> tuple:
    targets, source = indices
    return _spread(ct, source, targets), _no_gradient(targets), _no_gradient(source)


_spread.defvjp(lambda x, *indices: (_spread(x, *indices), indices), _spread_bwd)
_collect.defvjp(lambda x, *indices: (_collect(x, *indices), indices), _collect_bwd)


@dataclasses.dataclass(frozen=True)
class PureJax:
    """Expert parallelism over a mesh axis, inside `jax.shard_map`."""

    axis: str
    ep_size: int
    num_experts: int
    recv_capacity: int
    pair_capacity: int

    def dispatch(self, x: Array, topk_idx: Array, topk_weights: Array) -> Grouped:
        """Args: x [T, H], topk_idx i32 [T, K], topk_weights f32 [T, K]."""
        slot, token, unsent = self._slots(topk_idx)
        rows = self._exchange(_spread(x, token, slot))
        idx = self._exchange(topk_idx.at[token].get(mode="fill", fill_value=-1))
        weights = self._exchange(_spread(topk_weights, token, slot))

        source, place, group_sizes, unplaced = self._group(idx)
        entry = place.reshape(-1, 1)
        return Grouped(
            x=_spread(rows, source, place),
            group_sizes=group_sizes,
            weights=_spread(weights.reshape(-1, 1), self._entries(place), entry)[:, 0],
            overflow=(unsent + unplaced)[None],
            handle=Handle(slot, token, place, source),
        )

    def combine(self, y: Array, handle: Handle, weights: Array) -> Array:
        """Args: y [recv_capacity, H], weights f32 [recv_capacity]. Returns [T, H] in y's dtype."""
        weighted = y.astype(jnp.float32) * weights[:, None]
        rows = _collect(weighted, handle.place, handle.source).astype(y.dtype)
        return _collect(self._exchange(rows), handle.slot, handle.token)

    def _exchange(self, rows: Array) -> Array:
        return lax.all_to_all(rows, self.axis, 0, 0, tiled=True)

    def _slots(self, topk_idx: Array) -> tuple[Array, Array, Array]:
        """`Handle.slot`, `Handle.token`, and how many (token, rank) have no slot."""
        num_tokens, capacity = topk_idx.shape[0], self.pair_capacity
        ranks = jnp.arange(self.ep_size, dtype=jnp.int32)
        rank = topk_idx // (self.num_experts // self.ep_size)
        goes = (rank[:, :, None] == ranks).any(1)
        place = jnp.cumsum(goes, axis=0, dtype=jnp.int32) - 1
        fits = goes & (place < capacity)
        slot = jnp.where(fits, ranks * capacity + place, self.ep_size * capacity)
        tokens = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32)[:, None], slot.shape)
        token = jnp.full((self.ep_size * capacity,), num_tokens, jnp.int32)
        token = token.at[slot].set(tokens, mode="drop")
        return slot, token, (goes & ~fits).sum(dtype=jnp.int32)

    def _group(self, topk_idx: Array) -> tuple[Array, Array, Array, Array]:
        """`Handle.source` and `place`, group sizes, and how many expert rows have no place."""
        num_slots, top_k = topk_idx.shape
        num_local = self.num_experts // self.ep_size
        local = topk_idx - lax.axis_index(self.axis).astype(jnp.int32) * num_local
        key = jnp.where((local >= 0) & (local < num_local), local, num_local).reshape(-1)
        # One array of unique numbers sorts faster than a stable sort of pairs.
        order = jnp.sort(key * key.size + jnp.arange(key.size, dtype=jnp.int32))
        order = order[: self.recv_capacity]
        entry = jnp.where(order < num_local * key.size, order % key.size, key.size)
        place = jnp.full(key.shape, self.recv_capacity, jnp.int32)
        place = place.at[entry].set(jnp.arange(entry.size, dtype=jnp.int32), mode="drop")
        source = jnp.where(entry < key.size, entry // top_k, num_slots)
        group_sizes = jnp.bincount(key, length=num_local + 1)[:-1].astype(jnp.int32)
        unplaced = jnp.maximum(group_sizes.sum(dtype=jnp.int32) - self.recv_capacity, 0)
        return source, place.reshape(num_slots, top_k), group_sizes, unplaced

    def _entries(self, place: Array) -> Array:
        """The (slot, k) of each expert row, the inverse of `place`."""
        flat = place.reshape(-1)
        entry = jnp.full((self.recv_capacity,), flat.size, jnp.int32)
        return entry.at[flat].set(jnp.arange(flat.size, dtype=jnp.int32), mode="drop")
