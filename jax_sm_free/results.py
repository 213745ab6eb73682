"""The results of the receiving ops: pytrees of per-rank arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a dispatch put its rows. Hand it on to `combine_send`, and do not look inside.

    In the shapes, R is ep_size * max_tokens. Token rows are numbered by source rank, then source
    token.

    Attributes:
      topk_idx: i32 [T, top_k], by which this rank dispatched.
      rows: i32 [R, fanout]. For each token row received, the rows of `recv.x` that belong to it,
        in k order. An entry is -1 where there is no such row, because the expert is another rank's
        or the row was dropped. fanout is top_k for output="experts" and 1 for output="tokens".
      num_rows_from: i32 [ep_size], token rows received from each rank.
      output: "experts" or "tokens", the form in which the rows were received (static).
      node_topk: i32 [num_nodes * max_tokens, top_k]. What each other node sent to this rank, for
        all ranks of this node: row m * max_tokens + i has the experts of the i-th row from node m.
        An expert is numbered within the node: (position of its rank in the node) *
        num_local_experts + its local expert. -1 stands for no expert of this node, and for no row.
        None without a `node_axis`.
    """

    topk_idx: Array
    rows: Array
    num_rows_from: Array
    output: str = dataclasses.field(metadata={"static": True})
    node_topk: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Received:
    """Rows grouped by expert, as `jax.lax.ragged_dot` takes them.

    Attributes:
      x: [recv_capacity, hidden], or a (values, scales) pair, as it was sent. The rows are in order
        of local expert, then source rank, then source token, then k. Padding rows and rows past the
        last group are bytes of zero. As scales of float8_e8m0fnu, a dtype without a zero, such
        bytes are 2**-127.
      group_sizes: i32 [num_local_experts], rows of each group, padding included.
      counts: i32 [num_local_experts], rows that were sent to each expert. Dropped rows count,
        padding does not.
      weights: f32 [recv_capacity], the weight of each row; zero for padding.
      dropped: i32 [], expert rows for which `recv_capacity` had no place. With the default
        capacity, only tokens that name an expert twice can cause such rows.
      layout: for `combine_send`.
      expert_capacity: rows of every group, if the buffer has groups of one size; else None
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

        Rows past the last group count as the last expert's.
        """
        ends = jnp.cumsum(self.group_sizes)
        rows = jnp.arange(self.weights.shape[0], dtype=jnp.int32)
        num_ended = jnp.sum(rows[:, None] >= ends, axis=1, dtype=jnp.int32)
        return jnp.minimum(num_ended, self.group_sizes.shape[0] - 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReceivedTokens:
    """One row for each (token, rank): the form in which DeepEP gives the rows.

    In the shapes, R is ep_size * max_tokens. Rows past `num_tokens` are zero.

    Attributes:
      x: [R, hidden], or a (values, scales) pair. The rows are in order of source rank, then source
        token.
      topk_idx: i32 [R, top_k], local experts in the k order of the source; -1 for an expert of
        another rank.
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
