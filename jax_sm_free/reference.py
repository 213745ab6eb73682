"""The contract in plain JAX: what every transport must return, with no custom call.

Slow and simple. It is the oracle of the tests, and the place to read what each operation means.
`Buffer` and `overlap` here take the place of those in `jax_sm_free`: a program runs on either.

It differs from the real implementation in three ways: nothing overlaps; a sent value may be used
any number of times; and an index outside [-1, num_experts) selects no expert instead of being a
fault. XLA:CPU flushes denormal numbers to zero, so sums below the smallest normal number are zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from jax_sm_free import checks
from jax_sm_free.config import Config
from jax_sm_free.float8_wire import through_float8
from jax_sm_free.results import Layout, Received, ReceivedTokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Dispatched:
    """What `dispatch_send` hands to `dispatch_recv`: its operands, not yet moved."""

    x: Any
    topk_idx: Array
    topk_weights: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Combined:
    """What `combine_send` hands to `combine_recv`: rows reduced, not yet moved."""

    rows: Array
    layout: Layout


@dataclasses.dataclass(frozen=True)
class _Arrivals:
    """Every (token, k) of the group as one rank sees it; M = ep_size * T, E = local experts.

    Attributes:
      x: [M, ...] arrays, by source rank, then token.
      expert: i32 [M, top_k], local expert; E where the entry is not for this rank.
      weights: f32 [M, top_k].
      token_rows: i32 [R], which of the M tokens is the i-th token row received; M past the last.
      num_rows_from: i32 [ep_size].
      counts: i32 [E].
    """

    x: Any
    expert: Array
    weights: Array
    token_rows: Array
    num_rows_from: Array
    counts: Array


def overlap(sent: Any, fn: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """Computes `fn(*args)` between a send and its recv.

    Args:
      sent: a sent value or a recv hook, of any operation.
      fn: compute that does not depend on what is in flight.
      *args: its operands.

    Returns:
      `(fn(*args), sent)`; use this `sent` from here on.
    """
    return fn(*args), sent


class Buffer:
    """One expert-parallel group. Methods run inside `jax.shard_map` over the buffer's axis.

    Shapes below: T tokens of this rank and call (0 to max_tokens, the same on every rank), H =
    hidden, K = top_k, E = num_local_experts, R = ep_size * max_tokens.

    Args:
      mesh: the mesh of the `shard_map`. It may have further axes: each group works on its own.
      axis: name of the expert-parallel axis, or a tuple of names, slowest first.
      hidden, num_experts, top_k, max_tokens, recv_capacity, capacity_factor, num_slots,
        expert_alignment, expert_capacity, dtype, wire_dtype, timeout_s: see `Config`.
      transport: taken for the sake of equal signatures, unused.

    Raises:
      TypeError, ValueError: for sizes out of range, or an axis the mesh does not have.
    """

    def __init__(
        self,
        mesh: Mesh,
        axis: str | tuple[str, ...],
        *,
        hidden: int,
        num_experts: int,
        top_k: int,
        max_tokens: int,
        recv_capacity: int | None = None,
        capacity_factor: float | None = None,
        num_slots: int = 2,
        expert_alignment: int = 1,
        expert_capacity: int | None = None,
        dtype: Any = jnp.bfloat16,
        wire_dtype: Any = None,
        transport: str = "auto",
        timeout_s: float = 100.0,
    ) -> None:
        del transport
        self._mesh_axes = mesh.axis_names
        self.axes = checks.check_mesh(mesh, axis)
        self.config = Config(
            ep_size=checks.group_size(mesh, self.axes),
            hidden=hidden,
            num_experts=num_experts,
            top_k=top_k,
            max_tokens=max_tokens,
            recv_capacity=recv_capacity,
            capacity_factor=capacity_factor,
            num_slots=num_slots,
            expert_alignment=expert_alignment,
            expert_capacity=expert_capacity,
            dtype=dtype,
            wire_dtype=wire_dtype,
            timeout_s=timeout_s,
        )

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing to release."""

    def check(self) -> None:
        """Nothing can be pending."""

    def dispatch_send(self, x: Any, topk_idx: Array, topk_weights: Array) -> Any:
        """Sends every token to the ranks of its experts. Collective.

        Args:
          x: [T, H] of the buffer's dtype, or a pair (values [T, A], scales [T, B]) of any dtypes
            of whole bytes, but no pair with a `wire_dtype`.
          topk_idx: i32 [T, K], experts in [-1, num_experts); -1 selects none. A token may name
            an expert twice.
          topk_weights: f32 [T, K].

        Returns:
          The sent value, for one `dispatch_recv`.

        Raises:
          TypeError, ValueError: at trace time, for a dtype or shape other than these, and for
            T > max_tokens.
        """
        op = "dispatch_send"
        checks.check_rows(op, self.config, x)
        num_tokens = jax.tree.leaves(x)[0].shape[0]
        checks.check_topk(op, self.config, num_tokens, topk_idx, topk_weights)
        if self.config.wire.quantises:
            x = through_float8(x)
        return _Dispatched(x, topk_idx, topk_weights)

    def dispatch_recv(self, sent: Any, output: str = "experts") -> Received | ReceivedTokens:
        """Receives what all ranks sent to this one. Collective.

        Args:
          sent: from `dispatch_send`, once.
          output: "experts" gives one row per (token, expert here), grouped by expert; "tokens"
            one row per (token, rank), which `recv_capacity` and `expert_alignment` do not touch.

        Returns:
          `Received` or `ReceivedTokens`.
        """
        if output not in ("experts", "tokens"):
            raise ValueError(f"expected output 'experts' or 'tokens', got {output!r}")
        arrivals = _gather(self.config, self.axes, sent)
        form = _by_expert if output == "experts" else _by_token
        return form(self.config, sent.topk_idx, arrivals)

    def combine_send(self, y: Array, layout: Layout, weights: Array | None = None) -> Any:
        """Sums each token's rows here, in k order in float32, and sends them home. Collective.

        Args:
          y: of the buffer's dtype, [recv_capacity, H] for a layout of output="experts" and [R, H]
            for output="tokens".
          layout: of the dispatch whose tokens these are.
          weights: f32 [recv_capacity] or [R], a factor for each row; None is 1.

        Returns:
          The sent value, for one `combine_recv`.

        Raises:
          TypeError, ValueError: at trace time, for a dtype or shape other than these.
        """
        op, config = "combine_send", self.config
        checks.check_layout(op, config, layout)
        num_rows = config.recv_capacity if layout.output == "experts" else config.max_recv_tokens
        checks.check_array(op, "y", y, config.dtype, (num_rows, config.hidden))
        if weights is not None:
            checks.check_array(op, "weights", weights, jnp.float32, (num_rows,))
        return _Combined(_reduce_rows(y, layout.rows, weights), layout)

    def combine_recv(self, sent: Any) -> Array:
        """Receives and sums, in rank order in float32, what the ranks made of this rank's tokens.

        Collective.

        Args:
          sent: from `combine_send`, once.

        Returns:
          [T, H] in y's dtype; zero for a token that was sent nowhere.
        """
        layout = sent.layout
        num_tokens = layout.topk_idx.shape[0]
        first = jnp.cumsum(layout.num_rows_from) - layout.num_rows_from
        step = jnp.arange(num_tokens, dtype=jnp.int32)
        block = jnp.where(step < layout.num_rows_from[:, None], first[:, None] + step, -1)
        returned = lax.all_to_all(_take_rows(sent.rows, block), self.axes, 0, 0)

        was_sent = _is_sent_to(self.config, layout.topk_idx)
        place = jnp.where(was_sent, jnp.cumsum(was_sent, axis=1) - 1, -1)
        addends = jax.vmap(_take_rows)(returned, place)
        return _sum_in_order(addends.astype(jnp.float32)).astype(sent.rows.dtype)

    @property
    def sent_specs(self) -> PartitionSpec:
        """For a sent value that crosses from one shard_map to another."""
        return PartitionSpec(self._mesh_axes)

    def dispatch(
        self,
        x: Any,
        topk_idx: Array,
        topk_weights: Array,
        *,
        output: str = "experts",
        return_recv_hook: bool = False,
    ) -> Any:
        """`dispatch_send` and `dispatch_recv` in one.

        Returns:
          The received rows, or with `return_recv_hook` a callable of no argument that gives them.
        """
        sent = self.dispatch_send(x, topk_idx, topk_weights)
        return _finish(return_recv_hook, lambda: self.dispatch_recv(sent, output))

    def combine(
        self,
        y: Array,
        layout: Layout,
        *,
        weights: Array | None = None,
        return_recv_hook: bool = False,
    ) -> Any:
        """`combine_send` and `combine_recv` in one.

        Returns:
          The sum, or with `return_recv_hook` a callable of no argument that gives it.
        """
        sent = self.combine_send(y, layout, weights)
        return _finish(return_recv_hook, lambda: self.combine_recv(sent))


def _finish(return_recv_hook: bool, hook: Callable[[], Any]) -> Any:
    return hook if return_recv_hook else hook()


def _take_rows(x: Array, rows: Array) -> Array:
    """x[rows], bytes of zero where the row is -1: a type of scales may have no zero."""
    if x.shape[0] == 0:
        x = jnp.zeros((1, *x.shape[1:]), x.dtype)
        rows = jnp.full_like(rows, -1)
    # A negative index would count from the end, one past the end is filled.
    rows = jnp.where(rows < 0, x.shape[0], rows)
    zero = np.zeros(x.dtype.itemsize, np.uint8).view(x.dtype)[0]
    return jnp.take(x, rows, axis=0, mode="fill", fill_value=zero)


def _sum_in_order(addends: Array) -> Array:
    """Sums over the first axis of [N, ...] from first to last, starting at +0.

    A loop, for two reasons: XLA keeps its order, and cannot look into it to contract a product
    that made the addends with the sum, which would skip a rounding. (It sees through an
    optimization_barrier where it expands those before fusion. A loop of one turn it does inline,
    but the first sum is exact.) An absent row is a zero, which changes no sum that began at +0.
    """
    zero = jnp.zeros_like(addends, shape=addends.shape[1:])
    return lax.scan(lambda total, addend: (total + addend, None), zero, addends)[0]


def _reduce_rows(y: Array, rows: Array, weights: Array | None) -> Array:
    """[R, H]: for each token row the sum of `weights * y` over its rows, in y's dtype."""
    values = y.astype(jnp.float32)
    if weights is not None:
        values = weights[:, None] * values
    return _sum_in_order(_take_rows(values, rows.T)).astype(y.dtype)


def _is_sent_to(config: Config, topk_idx: Array) -> Array:
    """Whether the token has an expert on the rank: bool [ep_size, T]."""
    rank = jnp.where(topk_idx >= 0, topk_idx // config.num_local_experts, -1)
    every_rank = jnp.arange(config.ep_size, dtype=jnp.int32)
    return (rank == every_rank[:, None, None]).any(-1)


def _gather(config: Config, axes: tuple[str, ...], sent: _Dispatched) -> _Arrivals:
    """Brings all tokens of the group together and finds those for this rank."""
    sent = jax.tree.map(lambda leaf: lax.all_gather(leaf, axes), sent)
    _, num_tokens, top_k = sent.topk_idx.shape
    num_all = config.ep_size * num_tokens
    num_experts = config.num_local_experts
    local = sent.topk_idx - lax.axis_index(axes).astype(jnp.int32) * num_experts
    expert = jnp.where((local >= 0) & (local < num_experts), local, num_experts)
    has_row = (expert < num_experts).any(-1)
    flat = expert.reshape(num_all, top_k)
    return _Arrivals(
        x=jax.tree.map(lambda leaf: leaf.reshape(num_all, leaf.shape[-1]), sent.x),
        expert=flat,
        weights=sent.topk_weights.reshape(num_all, top_k),
        token_rows=_indices_of(has_row.reshape(-1), config.max_recv_tokens),
        num_rows_from=has_row.sum(-1, dtype=jnp.int32),
        counts=jnp.bincount(flat.reshape(-1), length=num_experts + 1)[:-1].astype(jnp.int32),
    )


def _indices_of(mask: Array, size: int) -> Array:
    """i32 [size]: where `mask` holds, ascending, then -1."""
    place = jnp.where(mask, jnp.cumsum(mask) - 1, size)
    found = jnp.full((size,), -1, jnp.int32)
    return found.at[place].set(jnp.arange(mask.size, dtype=jnp.int32), mode="drop")


def _by_token(config: Config, topk_idx: Array, arrivals: _Arrivals) -> ReceivedTokens:
    """One row for each token row received."""
    here = arrivals.expert < config.num_local_experts
    expert = jnp.where(here, arrivals.expert, -1)
    token_rows = arrivals.token_rows
    used = token_rows >= 0
    num_tokens = arrivals.num_rows_from.sum(dtype=jnp.int32)
    identity = jnp.where(used, jnp.arange(used.size, dtype=jnp.int32), -1)
    return ReceivedTokens(
        x=jax.tree.map(lambda leaf: _take_rows(leaf, token_rows), arrivals.x),
        topk_idx=jnp.where(used[:, None], _take_rows(expert, token_rows), -1),
        topk_weights=_take_rows(jnp.where(here, arrivals.weights, 0), token_rows),
        counts=arrivals.counts,
        num_tokens=num_tokens,
        layout=Layout(topk_idx, identity[:, None], arrivals.num_rows_from, "tokens"),
    )


def _by_expert(config: Config, topk_idx: Array, arrivals: _Arrivals) -> Received:
    """One row for each kept (token, k), grouped by expert."""
    capacity, top_k = _capacity(config), config.top_k
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

    rows = _take_rows(row.reshape(-1, top_k), arrivals.token_rows)
    rows = jnp.where(arrivals.token_rows[:, None] < 0, -1, rows)
    return Received(
        x=jax.tree.map(lambda leaf: _take_rows(leaf, token), arrivals.x),
        group_sizes=group_sizes,
        counts=arrivals.counts,
        weights=_take_rows(arrivals.weights.reshape(-1), entry),
        dropped=(arrivals.counts - kept).sum(dtype=jnp.int32),
        layout=Layout(topk_idx, rows, arrivals.num_rows_from, "experts"),
        expert_capacity=config.expert_capacity,
    )


def _capacity(config: Config) -> int:
    assert config.recv_capacity is not None  # A Config has filled it in.
    return config.recv_capacity


def _round_up(value: Array, multiple: int) -> Array:
    return -(-value // multiple) * multiple


def _cut_level(config: Config, counts: Array) -> Array:
    """The largest level L for which the groups, cut to L rows each and padded, fit."""
    level = jnp.zeros((), jnp.int32)
    for bit in reversed(range(_capacity(config).bit_length())):
        higher = level + (1 << bit)
        padded = _round_up(jnp.minimum(counts, higher), config.expert_alignment)
        level = jnp.where(padded.sum() <= _capacity(config), higher, level)
    return level


def _position_in_group(group: Array, num_groups: int) -> Array:
    """How many earlier entries are of the same group; i32, as `group`."""
    order = jnp.argsort(group, stable=True)
    sizes = jnp.bincount(group, length=num_groups)
    first = jnp.cumsum(sizes) - sizes
    arange = jnp.arange(group.size, dtype=jnp.int32)
    return jnp.zeros_like(group).at[order].set(arange - first[group[order]].astype(jnp.int32))
