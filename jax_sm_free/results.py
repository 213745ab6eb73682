"""What the receiving ops return: pytrees of per-rank arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a dispatch put its rows; opaque to users, who hand it on to `combine_send`.

    With R = ep_size * max_tokens, token rows are numbered by source rank, then source token.

    Attributes:
      topk_idx: i32 [T, top_k], what this rank dispatched by.
      rows: i32 [R, fanout]. For each token row received, the rows of `recv.x` that belong to it,
        in k order; -1 where there is none (another rank's expert, or dropped).
        fanout is top_k for output="experts" and 1 for output="tokens".
      num_rows_from: i32 [ep_size], token rows received from each rank.
      output: "experts" or "tokens", the form it was received in (static).
    """

    topk_idx: Array
    rows: Array
    num_rows_from: Array
    output: str = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Received:
    """Rows grouped by expert, as `jax.lax.ragged_dot` takes them.

    Attributes:
      x: [recv_capacity, hidden], or a (values, scales) pair, as it was sent. By local expert, then
        source rank, then source token, then k. Padding rows and rows past the last group are bytes
        of zero. That is 2**-127 for scales of float8_e8m0fnu, a type without a zero.
      group_sizes: i32 [num_local_experts], rows of each group, padding included.
      counts: i32 [num_local_experts], rows that were sent to each expert: no padding, drops
        included.
      weights: f32 [recv_capacity], the row's weight; zero for padding.
      dropped: i32 [], expert rows that `recv_capacity` had no place for; by default such of
        tokens that name an expert twice.
      layout: for `combine_send`.
      expert_capacity: rows of every group, where the buffer has groups of one size; else None
        (static).
    """

    x: Any
    group_sizes: Array
    counts: Array
    weights: Array
    dropped: Array
    layout: Layout
    expert_capacity: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def expert(self) -> Array:
        """i32 [recv_capacity], the local expert of each row: `bias[recv.expert]` is a row's bias.

        A row past the last group has the last expert.
        """
        ends = jnp.cumsum(self.group_sizes)
        rows = jnp.arange(self.weights.shape[0], dtype=jnp.int32)
        num_ended = jnp.sum(rows[:, None] >= ends, axis=1, dtype=jnp.int32)
        return jnp.minimum(num_ended, self.group_sizes.shape[0] - 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReceivedTokens:
    """One row for each (token, rank): DeepEP's own form.

    With R = ep_size * max_tokens; rows past `num_tokens` are zero.

    Attributes:
      x: [R, hidden], or a (values, scales) pair. By source rank, then source token.
      topk_idx: i32 [R, top_k], local experts in k order of the source; -1 for another rank's.
      topk_weights: f32 [R, top_k]; zero where topk_idx is -1.
      counts: i32 [num_local_experts], expert rows of each expert.
      num_tokens: i32 [], rows in use.
      layout: for `combine_send`.
    """

    x: Any
    topk_idx: Array
    topk_weights: Array
    counts: Array
    num_tokens: Array
    layout: Layout
