"""What one rank receives of a dispatch: all tokens of the group, sorted for this rank."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_sm_free.config import Config
from jax_sm_free.reference.rows import take_rows
from jax_sm_free.results import Layout, Received, ReceivedTokens


@dataclasses.dataclass(frozen=True)
class Arrivals:
    """Every (token, k) of the group as one rank sees it.

    In the shapes, M is ep_size * T, E is the number of local experts, and R is ep_size *
    max_tokens.

    Attributes:
      x: [M, ...] arrays, in order of source rank, then token.
      expert: i32 [M, top_k], the local expert; E where the entry is not for this rank.
      weights: f32 [M, top_k].
      token_rows: i32 [R], which of the M tokens is the i-th token row received; -1 past the last.
      num_rows_from: i32 [ep_size], token rows received from each rank.
      counts: i32 [E], rows sent to each local expert.
      node_topk: as in `Layout`.
    """

    x: Any
    expert: Array
    weights: Array
    token_rows: Array
    num_rows_from: Array
    counts: Array
    node_topk: Array | None


def is_sent_to(config: Config, topk_idx: Array) -> Array:
    """Whether the token has an expert on the rank: bool [ep_size, T]."""
    rank = jnp.where(topk_idx >= 0, topk_idx // config.num_local_experts, -1)
    every_rank = jnp.arange(config.ep_size, dtype=jnp.int32)
    return (rank == every_rank[:, None, None]).any(-1)


def gather(config: Config, axes: tuple[str, ...], sent: Any) -> Arrivals:
    """Brings all tokens of the group together and finds those for this rank."""
    sent = jax.tree.map(lambda leaf: lax.all_gather(leaf, axes), sent)
    _, num_tokens, top_k = sent.topk_idx.shape
    num_all = config.ep_size * num_tokens
    num_experts = config.num_local_experts
    rank = lax.axis_index(axes).astype(jnp.int32)
    local = sent.topk_idx - rank * num_experts
    expert = jnp.where((local >= 0) & (local < num_experts), local, num_experts)
    has_row = (expert < num_experts).any(-1)
    flat = expert.reshape(num_all, top_k)
    return Arrivals(
        x=jax.tree.map(lambda leaf: leaf.reshape(num_all, leaf.shape[-1]), sent.x),
        expert=flat,
        weights=sent.topk_weights.reshape(num_all, top_k),
        token_rows=_indices_of(has_row.reshape(-1), config.max_recv_tokens),
        num_rows_from=has_row.sum(-1, dtype=jnp.int32),
        counts=jnp.bincount(flat.reshape(-1), length=num_experts + 1)[:-1].astype(jnp.int32),
        node_topk=_node_topk(config, rank, sent.topk_idx) if config.num_nodes > 1 else None,
    )


def _node_topk(config: Config, rank: Array, topk_idx: Array) -> Array:
    """`Layout.node_topk` of a rank, from topk_idx [ep_size, T, top_k] of all ranks."""
    num_nodes, stride = config.num_nodes, config.node_stride

    def node_of(rank: Array) -> Array:
        return rank // stride % num_nodes

    def local_of(rank: Array) -> Array:
        return rank // (stride * num_nodes) * stride + rank % stride

    every_rank = jnp.arange(config.ep_size, dtype=jnp.int32)
    rail = jnp.argsort(local_of(every_rank) != local_of(rank), stable=True)[:num_nodes]
    idx = topk_idx[rail]
    owner = idx // config.num_local_experts
    is_here = (idx >= 0) & (idx < config.num_experts) & (node_of(owner) == node_of(rank))
    expert = local_of(owner) * config.num_local_experts + idx % config.num_local_experts
    is_other = jnp.arange(num_nodes) != node_of(rank)
    is_row = is_here.any(-1) & is_other[:, None]
    place = jnp.where(is_row, jnp.cumsum(is_row, axis=1) - 1, config.max_tokens)
    rows = jnp.full((num_nodes, config.max_tokens, config.top_k), -1, jnp.int32)
    rows = rows.at[jnp.arange(num_nodes)[:, None], place].set(
        jnp.where(is_here, expert, -1), mode="drop"
    )
    return rows.reshape(-1, config.top_k)


def _indices_of(mask: Array, size: int) -> Array:
    """i32 [size]: where `mask` holds, ascending, then -1."""
    place = jnp.where(mask, jnp.cumsum(mask) - 1, size)
    found = jnp.full((size,), -1, jnp.int32)
    return found.at[place].set(jnp.arange(mask.size, dtype=jnp.int32), mode="drop")


def by_token(config: Config, topk_idx: Array, arrivals: Arrivals) -> ReceivedTokens:
    """One row for each token row received."""
    here = arrivals.expert < config.num_local_experts
    expert = jnp.where(here, arrivals.expert, -1)
    token_rows = arrivals.token_rows
    used = token_rows >= 0
    num_tokens = arrivals.num_rows_from.sum(dtype=jnp.int32)
    identity = jnp.where(used, jnp.arange(used.size, dtype=jnp.int32), -1)
    return ReceivedTokens(
        x=jax.tree.map(lambda leaf: take_rows(leaf, token_rows), arrivals.x),
        topk_idx=jnp.where(used[:, None], take_rows(expert, token_rows), -1),
        topk_weights=take_rows(jnp.where(here, arrivals.weights, 0), token_rows),
        counts=arrivals.counts,
        num_tokens=num_tokens,
        layout=Layout(
            topk_idx, identity[:, None], arrivals.num_rows_from, "tokens", arrivals.node_topk
        ),
    )


def by_expert(config: Config, topk_idx: Array, arrivals: Arrivals) -> Received:
    """One row for each kept (token, k), grouped by expert."""
    capacity, top_k = config.recv_capacity, config.top_k
    if config.expert_capacity is None:
        kept = jnp.minimum(arrivals.counts, _cut_level(config, arrivals.counts))
        group_sizes = _round_up(kept, config.expert_alignment)
    else:
        kept = jnp.minimum(arrivals.counts, config.expert_capacity)
        group_sizes = jnp.full_like(kept, config.expert_capacity)
    # The group that gathers what is for other ranks keeps nothing.
    start = jnp.append(jnp.cumsum(group_sizes) - group_sizes, 0)
    limit = jnp.append(kept, 0)

    expert = arrivals.expert.reshape(-1)
    position = _position_in_group(expert, config.num_local_experts + 1)
    row = jnp.where(position < limit[expert], start[expert] + position, -1).astype(jnp.int32)
    entry = jnp.full((capacity,), -1, jnp.int32)
    entry = entry.at[jnp.where(row < 0, capacity, row)].set(
        jnp.arange(row.size, dtype=jnp.int32), mode="drop"
    )
    token = jnp.where(entry < 0, -1, entry // top_k)

    rows = take_rows(row.reshape(-1, top_k), arrivals.token_rows)
    rows = jnp.where(arrivals.token_rows[:, None] < 0, -1, rows)
    return Received(
        x=jax.tree.map(lambda leaf: take_rows(leaf, token), arrivals.x),
        group_sizes=group_sizes,
        counts=arrivals.counts,
        weights=take_rows(arrivals.weights.reshape(-1), entry),
        dropped=(arrivals.counts - kept).sum(dtype=jnp.int32),
        layout=Layout(topk_idx, rows, arrivals.num_rows_from, "experts", arrivals.node_topk),
        expert_capacity=config.expert_capacity,
    )


def _round_up(value: Array, multiple: int) -> Array:
    return -(-value // multiple) * multiple


def _cut_level(config: Config, counts: Array) -> Array:
    """The largest level L for which the groups, cut to L rows each and padded, fit."""
    level = jnp.zeros((), jnp.int32)
    for bit in reversed(range(config.recv_capacity.bit_length())):
        higher = level + (1 << bit)
        padded = _round_up(jnp.minimum(counts, higher), config.expert_alignment)
        level = jnp.where(padded.sum() <= config.recv_capacity, higher, level)
    return level


def _position_in_group(group: Array, num_groups: int) -> Array:
    """How many earlier entries are of the same group; i32, as `group`."""
    order = jnp.argsort(group, stable=True)
    sizes = jnp.bincount(group, length=num_groups)
    first = jnp.cumsum(sizes) - sizes
    arange = jnp.arange(group.size, dtype=jnp.int32)
    return jnp.zeros_like(group).at[order].set(arange - first[group[order]].astype(jnp.int32))
