"""`Buffer`: one expert-parallel group, its memory, and the public ops."""

from __future__ import annotations

import weakref
from types import NoneType
from typing import Any, Literal, Self, TypeVar, overload

import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jax_sm_free import capacity, checks, forwarding, pending, receiving, sending, transports
from jax_sm_free.config import Config
from jax_sm_free.lifetime import Lifetime
from jax_sm_free.pending import Hook, Sent
from jax_sm_free.primitives import BufferRef
from jax_sm_free.results import Layout, Received, ReceivedTokens
from jax_sm_free.whole_ops import Output, Rows, WholeOps, check_output

_T = TypeVar("_T")

# The buffers that the program still refers to, by the names that compiled programs have for them.
named_buffers: weakref.WeakValueDictionary[str, Buffer] = weakref.WeakValueDictionary()


class Buffer(WholeOps, Lifetime):
    """Expert-parallel dispatch and combine over one or several mesh axes.

    Every op is collective: all ranks of the group call it, in the same program, inside `jax.jit`
    and `jax.shard_map` over the buffer's axes. Shapes are those of one rank. If the mesh has other
    axes besides the buffer's, it has several groups. Each group works on its own, but a fault ends
    the run of all groups.

    The ops raise TypeError or ValueError at trace time if a dtype, shape, mesh or sent value is not
    the expected one, with both in the text. They raise RuntimeError if the buffer is closed. An
    error while the program runs is a fault: see `check`.

    Attributes:
      config: the sizes (`Config`).
      mesh, axes: where the ranks are. A rank is the position along `axes`, the first axis slowest.
      node_axis: the one of `axes` along which the nodes are, or None.
      transport: the name of what moves the bytes.
      name: a text that tells this buffer from equal ones, or None.
      program_name: the name by which compiled programs find the buffer (docs/saving.md).
    """

    def __init__(
        self,
        mesh: Mesh,
        axis: str | tuple[str, ...],
        *,
        node_axis: str | None = None,
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
        name: str | None = None,
    ) -> None:
        """Opens the buffer. Collective where the mesh has devices of several processes.

        All of these processes open it, with the same arguments, and the call returns when all have
        opened it. A buffer for devices that are only described, to compile programs ahead of time,
        takes no memory.

        Args:
          mesh: the devices.
          axis: the mesh axis whose ranks share the experts, or several, slowest first.
          node_axis: the one of these axes that goes from node to node. A token then crosses once to
            each other node that has one of its experts, and is sent on there; a combine sums within
            each node first. None, or an axis of size 1: each rank sends to each other rank.
          hidden: columns of a row.
          num_experts: experts of the whole group. Rank r owns the r-th block of num_experts /
            ep_size experts.
          top_k: experts that a token names, 1 to 32.
          max_tokens: tokens per rank and call, at most.
          recv_capacity: expert rows that a rank can receive. None stands for
            `Config.worst_case_capacity`, with a UserWarning if that is more than 4 times
            `Config.balanced_load`.
          capacity_factor: sets `recv_capacity` to so many times the balanced load, which is
            max_tokens * top_k rows. `Config` says how it is rounded.
          num_slots: exchanges that may be in flight at once on a rank, 1 to 64.
          expert_alignment: groups are padded to a multiple of this many rows.
          expert_capacity: rows of every group: further rows are dropped, missing rows are padding.
            None makes each group as large as its rows need.
          dtype: of rows: bfloat16, float16 or float32.
          wire_dtype: None for rows that travel in `dtype`. float8_e4m3fn for rows that dispatch
            quantises on their way, to half the bytes of bfloat16; `Config` has the arithmetic.
          transport: "auto" for the one that connects the devices: "in_process" for CPU devices of
            this process, "ucx" for CPU devices of several processes, "cuda_peer" for GPUs of this
            process, "nvshmem" for GPUs of several processes, one GPU of each. By its name, to get
            an error if it is not that one.
          timeout_s: seconds that a receive waits before it reports a fault. If each process
            compiles for itself, this has to be longer than a compilation: a process that finds its
            program in JAX's persistent cache waits in the run for those that still compile.
          name: tells this buffer from equal ones in a program that is saved in one process and runs
            in another (docs/saving.md). With None the order in which equal buffers are opened tells
            them apart.

        Raises:
          TypeError, ValueError: for a bad argument, with its name, the expected and the given value
            in the text. If arguments differ between processes, all processes raise.
          NotImplementedError: for devices that no transport of this build reaches.
          ImportError: if the package of the transport is not installed.
          TimeoutError: if a process of the mesh did not open the buffer, which the text names.
          RuntimeError: if a process of the mesh could not open the buffer, or could not be reached
            by another one. The text names it.
        """
        axes = checks.check_mesh(mesh, axis)
        config = Config(
            ep_size=checks.group_size(mesh, axes),
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
            **checks.nodes_of(mesh, axes, node_axis),
        )
        if recv_capacity is None and expert_capacity is None and capacity_factor is None:
            capacity.warn_of_default(config)
        self._open(mesh, axes, node_axis, config, transport, name)

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
        """Opens a buffer of the sizes of a `Config`. Collective as `Buffer(...)` is.

        The sizes are as in `buffer.config` of another buffer, or of a `Config` made by hand. There
        is no warning for a large `recv_capacity`, because a `Config` always says its number.

        Args:
          mesh: as for `Buffer`.
          axis: as for `Buffer`.
          config: the sizes. Its `ep_size` is the number of devices along `axis`, and its
            `num_nodes` and `node_stride` are those of `node_axis`.
          node_axis: as for `Buffer`.
          transport: as for `Buffer`.
          name: as for `Buffer`.

        Raises:
          TypeError: if `config` is no `Config`.
          ValueError: if `config` is for another number of ranks, or for other nodes.
          TypeError, ValueError, and others: as `Buffer` does.
        """
        axes = checks.check_mesh(mesh, axis)
        checks.check_config("from_config", config, mesh, axes, node_axis)
        buffer = cls.__new__(cls)
        buffer._open(mesh, axes, node_axis, config, transport, name)
        return buffer

    def _open(
        self,
        mesh: Mesh,
        axes: tuple[str, ...],
        node_axis: str | None,
        config: Config,
        transport: str,
        name: str | None,
    ) -> None:
        if not isinstance(name, (str, NoneType)):
            raise TypeError(f"expected name to be a string or None, got {name!r}")
        self.mesh, self.axes, self.config, self.name = mesh, axes, config, name
        self.node_axis = node_axis
        chosen = transports.choose(mesh, transport)
        self.transport = chosen.name
        opened = chosen.open(mesh, axes, config, name)
        self.program_name = opened.program_name
        Lifetime.__init__(self, opened)
        self._ref = BufferRef(config, self.program_name, chosen.names_calls)
        if opened.native is not None:
            named_buffers[self.program_name] = self

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "open"
        return f"Buffer({self.axes}, {self.transport}, {state}, {self.config})"

    # ------------------------------------------------------------------------------ split ops

    def dispatch_send(self, x: Rows, topk_idx: Array, topk_weights: Array) -> Sent:
        """Packs each token once for every rank that owns one of its experts. Collective.

        Args:
          x: [T, hidden] of the buffer's dtype, with T <= max_tokens. T is the same on all ranks: a
            rank with fewer tokens pads (see `topk_idx`). Or a pair (values [T, A], scales [T, B])
            of any dtypes of whole bytes. The rows of a pair travel as they are, and have no
            gradient. View 4-bit numbers as int8, two numbers in one. A row of values and its
            scales together are at most as wide as a row of the buffer (`Config.row_bytes`). A
            buffer with a `wire_dtype` takes no pair, because it quantises rows itself.
          topk_idx: i32 [T, top_k] in [-1, num_experts); -1 selects none. A token with -1 only is
            padding: it is not sent, and combine returns zeros for it.
          topk_weights: f32 [T, top_k].

        Returns:
          The sent value, for one `dispatch_recv`, and for one `dispatch_forward` before it.
        """
        self._check_usable("dispatch_send")
        return sending.dispatch(self._ref, self.mesh, self.axes, x, topk_idx, topk_weights)

    @overload
    def dispatch_forward(self, pending: Sent) -> Sent: ...
    @overload
    def dispatch_forward(self, pending: Hook[_T]) -> Hook[_T]: ...

    def dispatch_forward(self, pending: Any) -> Any:
        """Sends on within this node what has come for it from other nodes. Collective.

        Optional: where nobody calls it, the recv does its work. `overlap` before it computes while
        rows travel between nodes, `overlap` behind it while they travel within a node. The backward
        pass has a forward in the same place. Without a `node_axis` there is nothing to send on.

        Args:
          pending: what `dispatch_send` returned, or the receive hook of a `dispatch`, through
            `overlap` or not.

        Returns:
          The sent value, or the hook, to use from here on. A second forward of it is a ValueError.
        """
        return self._forward("dispatch_forward", pending, "dispatch")

    @overload
    def dispatch_recv(self, sent: Sent, output: Literal["experts"] = "experts") -> Received: ...
    @overload
    def dispatch_recv(self, sent: Sent, output: Literal["tokens"]) -> ReceivedTokens: ...
    @overload
    def dispatch_recv(self, sent: Sent, output: Output) -> Received | ReceivedTokens: ...

    def dispatch_recv(self, sent: Sent, output: Output = "experts") -> Received | ReceivedTokens:
        """Waits for the rows of a `dispatch_send` and unpacks them. Collective.

        Args:
          sent: what `dispatch_send` or `dispatch_forward` returned, through `overlap` or not.
          output: "experts" for rows grouped by expert, at most `recv_capacity` of them. "tokens"
            for one row per (token, rank). These are at most ep_size * max_tokens, and none of them
            is dropped.

        Returns:
          `Received` for "experts", `ReceivedTokens` for "tokens".
        """
        op = "dispatch_recv"
        self._check_usable(op)
        check_output(op, output)
        sent = forwarding.forwarded(self._ref, op, sent, "dispatch")
        receive = receiving.by_expert if output == "experts" else receiving.by_token
        return receive(self._ref, sent)

    def combine_send(self, y: Array, layout: Layout, weights: Array | None = None) -> Sent:
        """Sums each token's rows here and sends the sum back to the token's rank. Collective.

        The sum is that of weights[row_k] * y[row_k] over k, in k order, in float32, cast once to
        the buffer's dtype.

        Args:
          y: [recv_capacity, hidden] of the buffer's dtype, with rows as in `Received.x`. For a
            layout of `ReceivedTokens`, [ep_size * max_tokens, hidden].
          layout: of the dispatch that these rows came with. It may be that of another buffer over
            the same axes of the same mesh, if the two have equal sizes. Only `hidden`, `dtype`,
            `wire_dtype`, `num_slots` and `timeout_s` may differ, on which routing does not depend.
          weights: f32 [rows of y]; None for a plain sum.

        Returns:
          The sent value, for one `combine_recv`, and for one `combine_forward` before it.
        """
        self._check_usable("combine_send")
        return sending.combine(self._ref, y, layout, weights)

    @overload
    def combine_forward(self, pending: Sent) -> Sent: ...
    @overload
    def combine_forward(self, pending: Hook[_T]) -> Hook[_T]: ...

    def combine_forward(self, pending: Any) -> Any:
        """Adds up the sums of the ranks of this node, and sends them to other nodes. Collective.

        The sum over a node's ranks is in rank order, in float32, cast once to the buffer's dtype.
        Optional, as `dispatch_forward` is. `overlap` before it computes while rows travel within a
        node, `overlap` behind it while they travel between nodes.

        Args:
          pending: what `combine_send` returned, or the receive hook of a `combine`, through
            `overlap` or not.

        Returns:
          The sent value, or the hook, to use from here on. A second forward of it is a ValueError.
        """
        return self._forward("combine_forward", pending, "combine")

    def combine_recv(self, sent: Sent) -> Array:
        """Waits for the sums of a `combine_send` and adds them up. Collective.

        Args:
          sent: what `combine_send` or `combine_forward` returned, through `overlap` or not.

        Returns:
          [T, hidden] of the buffer's dtype: for each token the sum over the ranks of its experts,
          in rank order, in float32, cast once. With a `node_axis` it is the sum over nodes, in node
          order, of the sums over each node's ranks, in rank order. Each of these sums, also that of
          this rank's own node, is in float32 and cast once. A token that named no expert gets
          zeros.
        """
        op = "combine_recv"
        self._check_usable(op)
        return receiving.sums(self._ref, forwarding.forwarded(self._ref, op, sent, "combine"))

    def _forward(self, op: str, waiting: Any, kind: str) -> Any:
        self._check_usable(op)
        return pending.forward(waiting, lambda s: forwarding.forward(self._ref, op, s, kind))

    @property
    def sent_specs(self) -> PartitionSpec:
        """The `out_specs` and `in_specs` of a `Sent` that crosses from shard_map to shard_map.

        A send can be in one shard_map and its recv in another one of the same program, with
        `overlap` between the two, outside of both. There arrays are global, and XLA shards the
        compute. Each array of a `Sent`, and of a `Layout`, has a part for every device of the mesh,
        one after the other in its first dimension, whatever the axes of the mesh are. This holds
        for dispatch and combine, with and without `check_vma`, and for automatic and explicit axes
        of the mesh.
        """
        return PartitionSpec(self.mesh.axis_names)

    def _check_usable(self, op: str) -> None:
        self._check_open(op)
        checks.check_inside(op, self.mesh, self.axes)
