"""`Buffer` and `overlap` of the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Self, TypeVar, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from jax_sm_free import checks
from jax_sm_free import pending as waiting
from jax_sm_free.config import Config
from jax_sm_free.reference.float8 import through_wire
from jax_sm_free.reference.receiving import by_expert, by_token, gather, is_sent_to
from jax_sm_free.reference.rows import reduce_rows, sum_by_node, take_rows
from jax_sm_free.results import Layout, Received, ReceivedTokens
from jax_sm_free.whole_ops import Output, Rows, WholeOps, check_output

_R = TypeVar("_R")
_T = TypeVar("_T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Dispatched:
    """What `dispatch_send` hands to `dispatch_recv`: its operands, which have not moved yet."""

    x: Any
    topk_idx: Array
    topk_weights: Array
    forwarded: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Combined:
    """What `combine_send` hands to `combine_recv`: reduced rows, which have not moved yet."""

    rows: Array
    layout: Layout
    forwarded: bool = dataclasses.field(default=False, metadata={"static": True})


def overlap(pending: _T, fn: Callable[..., _R], *args: Any) -> tuple[_R, _T]:
    """Computes `fn(*args)` between a send and its recv.

    Args:
      pending: a sent value or a receive hook, of any op.
      fn: compute that does not depend on what is in flight.
      *args: the arguments of `fn`.

    Returns:
      `(fn(*args), pending)`; use this `pending` from here on.
    """
    return fn(*args), pending


class Buffer(WholeOps):
    """One expert-parallel group. Methods run inside `jax.shard_map` over the buffer's axis.

    In the shapes below, T is the number of tokens of this rank and call (0 to max_tokens, the same
    on every rank), H is hidden, K is top_k, E is num_local_experts, and R is ep_size * max_tokens.

    Args:
      mesh: the mesh of the `shard_map`. If it has further axes, it has several groups, and each
        group works on its own.
      axis: the name of the expert-parallel axis, or a tuple of names, slowest first.
      node_axis: the one of these axes along which the nodes are, or None. It changes the order of
        the sums of a combine, and nothing else.
      transport, name: as `jax_sm_free.Buffer` has them. They change nothing here.
      **sizes: `hidden`, `num_experts`, `top_k`, `max_tokens` and what else `Config` takes.

    Raises:
      TypeError, ValueError: for sizes out of range, or an axis that the mesh does not have.
    """

    def __init__(
        self,
        mesh: Mesh,
        axis: str | tuple[str, ...],
        *,
        node_axis: str | None = None,
        transport: str = "auto",
        name: str | None = None,
        **sizes: Any,
    ) -> None:
        del transport, name
        axes = checks.check_mesh(mesh, axis)
        nodes = checks.nodes_of(mesh, axes, node_axis)
        config = Config(ep_size=checks.group_size(mesh, axes), **nodes, **sizes)
        self._open(mesh, axes, node_axis, config)

    @classmethod
    def from_config(
        cls,
        mesh: Mesh,
        axis: str | tuple[str, ...],
        config: Config,
        *,
        node_axis: str | None = None,
        transport: str = "auto",
        name: str | None = None,
    ) -> Self:
        """A buffer of the sizes of a `Config`, as `jax_sm_free.Buffer.from_config`."""
        del transport, name
        axes = checks.check_mesh(mesh, axis)
        checks.check_config("from_config", config, mesh, axes, node_axis)
        buffer = cls.__new__(cls)
        buffer._open(mesh, axes, node_axis, config)
        return buffer

    def _open(
        self, mesh: Mesh, axes: tuple[str, ...], node_axis: str | None, config: Config
    ) -> None:
        self.axes, self.node_axis, self.config = axes, node_axis, config
        self._mesh_axes = mesh.axis_names

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing to release."""

    def check(self) -> None:
        """Nothing can be pending."""

    def dispatch_send(self, x: Rows, topk_idx: Array, topk_weights: Array) -> Any:
        """Sends every token to the ranks of its experts. Collective.

        Args:
          x: [T, H] of the buffer's dtype, or a pair (values [T, A], scales [T, B]) of any dtypes
            of whole bytes. A buffer with a `wire_dtype` takes no pair.
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
        return _Dispatched(through_wire(x, self.config.wire), topk_idx, topk_weights)

    def dispatch_forward(self, pending: Any) -> Any:
        """Sends nothing on, because nothing has moved yet. Collective, optional, and once.

        Args:
          pending: from `dispatch_send`, or the receive hook of a `dispatch`.

        Returns:
          The sent value or the hook, for `dispatch_recv`.

        Raises:
          ValueError: at trace time, if it has been forwarded already.
        """
        return _forward("dispatch_forward", pending)

    @overload
    def dispatch_recv(self, sent: Any, output: Literal["experts"] = "experts") -> Received: ...
    @overload
    def dispatch_recv(self, sent: Any, output: Literal["tokens"]) -> ReceivedTokens: ...
    @overload
    def dispatch_recv(self, sent: Any, output: Output) -> Received | ReceivedTokens: ...

    def dispatch_recv(self, sent: Any, output: Output = "experts") -> Received | ReceivedTokens:
        """Receives what all ranks sent to this one. Collective.

        Args:
          sent: from `dispatch_send` or `dispatch_forward`, once.
          output: "experts" gives one row per (token, expert here), grouped by expert. "tokens"
            gives one row per (token, rank), which `recv_capacity` and `expert_alignment` do not
            change.

        Returns:
          `Received` or `ReceivedTokens`.
        """
        check_output("dispatch_recv", output)
        arrivals = gather(self.config, self.axes, sent)
        form = by_expert if output == "experts" else by_token
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
        checks.check_combine(self.config, y, layout, weights)
        return _Combined(reduce_rows(y, layout.rows, weights), layout)

    def combine_forward(self, pending: Any) -> Any:
        """As `dispatch_forward`, for what `combine_send` returned. Collective.

        Args:
          pending: from `combine_send`, or the receive hook of a `combine`.

        Returns:
          The sent value or the hook, for `combine_recv`.

        Raises:
          ValueError: at trace time, if it has been forwarded already.
        """
        return _forward("combine_forward", pending)

    def combine_recv(self, sent: Any) -> Array:
        """Receives and sums, in rank order in float32, what the ranks made of this rank's tokens.

        Collective. With a `node_axis` it sums over the ranks of each node, and then over the nodes.

        Args:
          sent: from `combine_send` or `combine_forward`, once.

        Returns:
          [T, H] in y's dtype; zero for a token that was sent nowhere.
        """
        layout = sent.layout
        num_tokens = layout.topk_idx.shape[0]
        first = jnp.cumsum(layout.num_rows_from) - layout.num_rows_from
        step = jnp.arange(num_tokens, dtype=jnp.int32)
        block = jnp.where(step < layout.num_rows_from[:, None], first[:, None] + step, -1)
        returned = lax.all_to_all(take_rows(sent.rows, block), self.axes, 0, 0)

        was_sent = is_sent_to(self.config, layout.topk_idx)
        place = jnp.where(was_sent, jnp.cumsum(was_sent, axis=1) - 1, -1)
        addends = jax.vmap(take_rows)(returned, place)
        return sum_by_node(addends, self.config.num_nodes, self.config.node_stride)

    @property
    def sent_specs(self) -> PartitionSpec:
        """For a sent value that crosses from one shard_map to another."""
        return PartitionSpec(self._mesh_axes)


def _forward(op: str, pending: Any) -> Any:
    def mark(sent: Any) -> Any:
        checks.check_not_forwarded(op, sent.forwarded)
        return dataclasses.replace(sent, forwarded=True)

    return waiting.forward(pending, mark)
