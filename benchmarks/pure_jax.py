"""The peer that ours is compared with: good expert parallelism in JAX without custom calls.

Messages are padded to a static capacity for each (source, destination), travel by
`lax.all_to_all`, and are grouped by expert with a sort and a gather. As in `jax_sm_free`, a token
travels once to a rank, however many of its experts live there. Rows are only ever gathered,
backwards too: XLA:CPU scatters rows ten times slower than it gathers them. Indices and weights
travel together, in one small collective beside that of the rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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
      num_sent: i32 [ep_size], rows sent to each rank.
      num_received: i32 [ep_size], rows received from each rank.
    """

    slot: Array
    token: Array
    place: Array
    source: Array
    num_sent: Array
    num_received: Array


class Grouped(NamedTuple):
    """As `jax_sm_free.Received`; `overflow`, i32 [1], counts rows that found no place."""

    x: Array
    group_sizes: Array
    weights: Array
    overflow: Array
    handle: Handle


@jax.custom_vjp
def spread(x: Array, source: Array, targets: Array) -> Array:
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
    return spread(ct, source, targets), _no_gradient(targets), _no_gradient(source)


spread.defvjp(lambda x, *indices: (spread(x, *indices), indices), _spread_bwd)
_collect.defvjp(lambda x, *indices: (_collect(x, *indices), indices), _collect_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchange_routing(axis: str, idx: Array, weights: Array) -> tuple[Array, Array]:
    """Sends idx i32 [N, K] and weights f32 [N, K], as messages to each rank, in one collective."""
    both = jnp.concatenate([idx, lax.bitcast_convert_type(weights, jnp.int32)], axis=1)
    idx, weights = jnp.split(lax.all_to_all(both, axis, 0, 0, tiled=True), 2, axis=1)
    return idx, lax.bitcast_convert_type(weights, jnp.float32)


def _exchange_routing_fwd(axis: str, idx: Array, weights: Array) -> tuple:
    return _exchange_routing(axis, idx, weights), idx


def _exchange_routing_bwd(axis: str, idx: Array, cts: tuple) -> tuple:
    return _no_gradient(idx), lax.all_to_all(cts[1], axis, 0, 0, tiled=True)


_exchange_routing.defvjp(_exchange_routing_fwd, _exchange_routing_bwd)


@dataclasses.dataclass(frozen=True)
class PureJax:
    """Expert parallelism over a mesh axis, inside `jax.shard_map`."""

    axis: str
    ep_size: int
    num_experts: int
    recv_capacity: int
    pair_capacity: int

    @property
    def expert_capacity(self) -> None:
        """None: groups have the rows they need; XLA merges spreading them with its gathers."""

    def dispatch(self, x: Array, topk_idx: Array, topk_weights: Array) -> Grouped:
        """Args: x [T, H], topk_idx i32 [T, K], topk_weights f32 [T, K]."""
        slot, token, num_sent, unsent = self._slots(topk_idx)
        idx, weights = _exchange_routing(
            self.axis,
            topk_idx.at[token].get(mode="fill", fill_value=-1),
            spread(topk_weights, token, slot),
        )
        by_source = (idx >= 0).any(1).reshape(self.ep_size, self.pair_capacity)
        num_received = by_source.sum(1, dtype=jnp.int32)
        rows = self._exchange(spread(x, token, slot), num_sent, num_received)

        source, place, group_sizes, unplaced = self._group(idx)
        entry = place.reshape(-1, 1)
        return Grouped(
            x=spread(rows, source, place),
            group_sizes=group_sizes,
            weights=spread(weights.reshape(-1, 1), self._entries(place), entry)[:, 0],
            overflow=(unsent + unplaced)[None],
            handle=Handle(slot, token, place, source, num_sent, num_received),
        )

    def combine(self, y: Array, handle: Handle, weights: Array) -> Array:
        """Args: y [recv_capacity, H], weights f32 [recv_capacity]. Returns [T, H] in y's dtype."""
        weighted = y.astype(jnp.float32) * weights[:, None]
        rows = _collect(weighted, handle.place, handle.source).astype(y.dtype)
        rows = self._exchange(rows, handle.num_received, handle.num_sent)
        return _collect(rows, handle.slot, handle.token)

    def dispatch_beside(self, fn: Callable[..., Any], args: tuple, *inputs: Array) -> tuple:
        """(fn(*args), dispatch(*inputs)), which XLA may run beside each other."""
        return fn(*args), self.dispatch(*inputs)

    def combine_beside(self, fn: Callable[..., Any], args: tuple, *inputs: Any) -> tuple:
        """(fn(*args), combine(*inputs)), which XLA may run beside each other."""
        return fn(*args), self.combine(*inputs)

    def _exchange(self, rows: Array, num_sent: Array, num_received: Array) -> Array:
        """Sends rows [ep_size * pair_capacity, H], a message to each rank; returns what comes."""
        del num_sent, num_received  # Every message is as long as the fullest.
        return lax.all_to_all(rows, self.axis, 0, 0, tiled=True)

    def _slots(self, topk_idx: Array) -> tuple[Array, Array, Array, Array]:
        """`Handle.slot`, `token` and `num_sent`, and how many (token, rank) have no slot."""
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
        num_sent = fits.sum(0, dtype=jnp.int32)
        return slot, token, num_sent, (goes & ~fits).sum(dtype=jnp.int32)

    def _group(self, topk_idx: Array) -> tuple[Array, Array, Array, Array]:
        """`Handle.source` and `place`, group sizes, and how many expert rows have no place."""
        num_slots, top_k = topk_idx.shape
        num_local = self.num_experts // self.ep_size
        local = topk_idx - lax.axis_index(self.axis).astype(jnp.int32) * num_local
        key = jnp.where((local >= 0) & (local < num_local), local, num_local).reshape(-1)
        # One array of unique numbers sorts faster than a stable sort of pairs.
        order = jnp.sort(key * key.size + jnp.arange(key.size, dtype=jnp.int32))
        missing = max(self.recv_capacity - key.size, 0)
        order = jnp.pad(
            order[: self.recv_capacity], (0, missing), constant_values=num_local * key.size
        )
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
