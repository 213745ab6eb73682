"""`Buffer`: one expert-parallel group, its memory, and the public ops."""

from __future__ import annotations

import os
import weakref
from types import NoneType, TracebackType
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jax_sm_free import autodiff, capacity, checks, receiving, stats, transports
from jax_sm_free.config import Config
from jax_sm_free.native import Native
from jax_sm_free.pending import Hook, Sent
from jax_sm_free.primitives import RowType, Target
from jax_sm_free.results import Layout, Received, ReceivedTokens
from jax_sm_free.stats import BufferStats
from jax_sm_free.varying import vary_alike

# The buffers that somebody refers to, by what programs call them.
named_buffers: weakref.WeakValueDictionary[str, Buffer] = weakref.WeakValueDictionary()

Output = Literal["experts", "tokens"]
Rows = Array | tuple[Array, Array]


class FaultError(RuntimeError):
    """An exchange went wrong: the text names rank, peer, op, what was expected and what seen."""


class Buffer:
    """Expert-parallel dispatch and combine over one or several mesh axes.

    Every op is collective: all ranks of the group call it, in the same program, inside `jax.jit`
    and `jax.shard_map` over the buffer's axes. Shapes are those of one rank. Mesh axes besides the
    buffer's make several groups, each on its own but for faults, which end a run in all of them.

    The ops raise TypeError or ValueError at trace time for a dtype, shape, mesh or sent value other
    than the expected one, with both in the text, and RuntimeError if the buffer is closed. What
    goes wrong when the program runs is a fault: see `check`.

    Attributes:
      config: the sizes (`Config`).
      mesh, axes: where the ranks are. A rank is the position along `axes`, the first axis slowest.
      transport: who moves the bytes.
      name: what tells this buffer from equal ones, or None.
      program_name: by what compiled programs find it (docs/saving.md).
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
        name: str | None = None,
    ) -> None:
        """Opens the buffer. Collective where the mesh has devices of several processes.

        All of them open it then, with the same arguments; it returns when all have. Takes no memory
        for a mesh of devices that are not there (ahead-of-time compiling).

        Args:
          mesh: the devices.
          axis: the mesh axis whose ranks share the experts, or several, slowest first.
          hidden: columns of a row.
          num_experts: of the whole group; rank r owns the r-th block of num_experts / ep_size.
          top_k: experts that a token names, 1 to 32.
          max_tokens: tokens per rank and call, at most.
          recv_capacity: expert rows a rank can receive; None for `Config.worst_case_capacity`,
            with a UserWarning where that is more than 4 times `Config.balanced_load`.
          capacity_factor: instead of `recv_capacity`, the same over the balanced load, which is
            max_tokens * top_k rows. `Config` says how it is rounded.
          num_slots: exchanges that may be in flight at once on a rank, 1 to 64.
          expert_alignment: groups are padded to a multiple of this many rows.
          expert_capacity: rows of every group, whatever it gets; None for as many as it needs.
          dtype: of rows: bfloat16, float16 or float32.
          wire_dtype: None for rows that travel in `dtype`, or float8_e4m3fn for rows that dispatch
            quantises on their way, to half the bytes of bfloat16; see `Config` for the arithmetic.
          transport: "auto"; "in_process" for CPU devices of this process, "ucx" for those of
            several; "cuda_peer" for GPUs of this process, "nvshmem" for one of each of several.
          timeout_s: seconds a receive waits before it is a fault. Where processes compile for
            themselves, longer than a compilation: one that has its program, from JAX's persistent
            cache for one, waits in the run for those that still compile.
          name: tells this buffer from equal ones in a program that is saved in one process and runs
            in another (docs/saving.md); None for the order in which equal ones are opened.

        Raises:
          TypeError, ValueError: for a bad argument, naming it, the expected and the given value; in
            all processes, where they differ from each other.
          NotImplementedError: for devices that no transport of this build reaches.
          ImportError: if the transport is "ucx" and the package libucx-cu13 is not there.
          TimeoutError: naming a process of the mesh that did not open the buffer.
          RuntimeError: naming a process of the mesh that could not open it, or that another one
            could not reach.
        """
        self.mesh = mesh
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
        if recv_capacity is None and expert_capacity is None and capacity_factor is None:
            capacity.warn_of_default(self.config)
        if not isinstance(name, (str, NoneType)):
            raise TypeError(f"expected name to be a string or None, got {name!r}")
        self.name = name
        chosen = transports.choose(mesh, transport)
        self.transport = chosen.name
        opened = chosen.open(mesh, self.axes, self.config, name)
        self._native, self._id, self.program_name = opened
        self._opener = os.getpid()
        self._closer = weakref.finalize(self, _drop, self._native, self._id, self._opener)
        self._closer.atexit = False  # then `native` closes what is open
        self._target = Target(self.config, self.program_name, chosen.names_calls)
        if self._native is not None:
            named_buffers[self.program_name] = self

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "open"
        return f"Buffer({self.axes}, {self.transport}, {state}, {self.config})"

    # ------------------------------------------------------------------------------ split ops

    def dispatch_send(self, x: Rows, topk_idx: Array, topk_weights: Array) -> Sent:
        """Packs each token once for every rank that owns one of its experts. Collective.

        Args:
          x: [T, hidden] of the buffer's dtype, T <= max_tokens (a rank with fewer rows than others
            pads: see `topk_idx`); or (values [T, A], scales [T, B])
            of any dtypes of whole bytes, whose rows travel as they are and have no gradient (view
            4-bit numbers as int8, two to one). A row of both together
            is at most as wide as one of the buffer's (`Config.row_bytes`). A buffer with a
            `wire_dtype` takes no pairs: it makes them itself.
          topk_idx: i32 [T, top_k] in [-1, num_experts); -1 selects none. A row of -1 alone is
            padding: it is not sent, and combine returns zeros for it.
          topk_weights: f32 [T, top_k].

        Returns:
          For `dispatch_recv`, once.
        """
        op = "dispatch_send"
        self._check_usable(op)
        row_type = checks.check_rows(op, self.config, x)
        values, *parts = x if isinstance(x, (tuple, list)) else (x,)
        checks.check_topk(op, self.config, values.shape[0], topk_idx, topk_weights)
        position = jax.lax.axis_index(checks.larger_axes(self.mesh) or self.axes)
        # What comes of equal operands differs by rank, but not by group.
        rank = jax.lax.axis_index(self.axes)
        _, values, topk_idx, topk_weights, *parts = vary_alike(
            rank, values, topk_idx, topk_weights, *parts
        )
        if parts:
            values, *parts = autodiff.no_gradient(values, *parts)
        scales = parts[0] if parts else receiving.no_scales(values, row_type)
        token = autodiff.dispatch_send(
            self._target, row_type, values, scales, topk_idx, topk_weights, position
        )
        # What the wire quantises has to be so on all ranks, this one's own rows too.
        quantises = self.config.wire.quantises
        own_rows = () if quantises else tuple(map(jax.lax.stop_gradient, (values, *parts)))
        return Sent(token, topk_idx, own_rows, "dispatch", row_type)

    @overload
    def dispatch_recv(self, sent: Sent, output: Literal["experts"] = "experts") -> Received: ...
    @overload
    def dispatch_recv(self, sent: Sent, output: Literal["tokens"]) -> ReceivedTokens: ...
    @overload
    def dispatch_recv(self, sent: Sent, output: Output) -> Received | ReceivedTokens: ...

    def dispatch_recv(self, sent: Sent, output: Output = "experts") -> Received | ReceivedTokens:
        """Waits for the rows of a `dispatch_send` and unpacks them. Collective.

        Args:
          sent: what `dispatch_send` returned, through `overlap` or not.
          output: "experts" for rows grouped by expert, cut to `recv_capacity`; "tokens" for one row
            per (token, rank), which are at most ep_size * max_tokens and are never cut.

        Returns:
          `Received` for "experts", `ReceivedTokens` for "tokens".
        """
        op = "dispatch_recv"
        self._check_usable(op)
        checks.check_sent(op, sent, "dispatch")
        if output == "experts":
            return receiving.by_expert(self._target, sent)
        if output == "tokens":
            return receiving.by_token(self._target, sent)
        raise ValueError(f"{op}: expected output 'experts' or 'tokens', got {output!r}")

    def combine_send(self, y: Array, layout: Layout, weights: Array | None = None) -> Sent:
        """Sums each token's rows here and sends the sum back to the token's rank. Collective.

        sum_k weights[row_k] * y[row_k], in k order, in float32, cast once to the buffer's dtype.

        Args:
          y: [recv_capacity, hidden] of the buffer's dtype, rows as in `Received.x`; for a layout of
            `ReceivedTokens`, [ep_size * max_tokens, hidden].
          layout: of the dispatch that these rows came with. It may be another buffer's, over the
            same axes of the same mesh and equal in all that routing depends on: in all sizes but
            `hidden`, `dtype`, `wire_dtype`, `num_slots` and `timeout_s`.
          weights: f32 [rows of y]; None for a plain sum.

        Returns:
          For `combine_recv`, once.
        """
        op = "combine_send"
        self._check_usable(op)
        config = self.config
        checks.check_layout(op, config, layout)
        num_rows = config.recv_capacity if layout.output == "experts" else config.max_recv_tokens
        checks.check_array(op, "y", y, config.dtype, (num_rows, config.hidden))
        if weights is not None:
            checks.check_array(op, "weights", weights, jnp.float32, (num_rows,))
        y, rows, num_rows_from, topk_idx, *present = vary_alike(
            y,
            layout.rows,
            layout.num_rows_from,
            layout.topk_idx,
            *(() if weights is None else (weights,)),
        )
        weights = present[0] if present else None
        token = autodiff.combine_send(self._target, y, weights, rows, num_rows_from)
        own_rows = (y, rows, num_rows_from, *(() if weights is None else (weights,)))
        own_rows = tuple(map(jax.lax.stop_gradient, own_rows))
        return Sent(token, topk_idx, own_rows, "combine", RowType(config.hidden, config.dtype))

    def combine_recv(self, sent: Sent) -> Array:
        """Waits for the sums of a `combine_send` and adds them up. Collective.

        Args:
          sent: what `combine_send` returned, through `overlap` or not.

        Returns:
          [T, hidden] of the buffer's dtype: the sum over the ranks of the token's experts, in rank
          order, in float32, cast once; zero for a token that named no expert.
        """
        op = "combine_recv"
        self._check_usable(op)
        checks.check_sent(op, sent, "combine")
        return receiving.sums(self._target, sent)

    @property
    def sent_specs(self) -> PartitionSpec:
        """For a `Sent` in `out_specs` and `in_specs`, where it crosses from shard_map to shard_map.

        A send in one shard_map, `overlap` outside, where arrays are global and compute is sharded
        by XLA, the recv in another shard_map, in the same program. Each array of a `Sent` has a
        part for every device of the mesh, whatever its axes are, one after the other in its first
        dimension: so have those of a `Layout`. For dispatch and combine, with and without
        `check_vma`, and with the axes of the mesh automatic or explicit.
        """
        return PartitionSpec(self.mesh.axis_names)

    # ------------------------------------------------------------------------------ whole ops

    def dispatch(
        self,
        x: Rows,
        topk_idx: Array,
        topk_weights: Array,
        *,
        output: Output = "experts",
        return_recv_hook: bool = False,
    ) -> Any:
        """`dispatch_send` and `dispatch_recv` in one go. Collective.

        Args:
          x: as for `dispatch_send`.
          topk_idx: as for `dispatch_send`.
          topk_weights: as for `dispatch_send`.
          output: as for `dispatch_recv`.
          return_recv_hook: whether to leave the receive to the caller.

        Returns:
          `Received` or `ReceivedTokens`; with `return_recv_hook` a `Hook`, whose call returns that.
        """
        if output not in ("experts", "tokens"):
            raise ValueError(f"dispatch: expected output 'experts' or 'tokens', got {output!r}")
        sent = self.dispatch_send(x, topk_idx, topk_weights)
        hook = Hook(lambda s: self.dispatch_recv(s, output), sent)
        return hook if return_recv_hook else hook()

    def combine(
        self,
        y: Array,
        layout: Layout,
        *,
        weights: Array | None = None,
        return_recv_hook: bool = False,
    ) -> Any:
        """`combine_send` and `combine_recv` in one go. Collective.

        Args:
          y: as for `combine_send`.
          layout: as for `combine_send`.
          weights: as for `combine_send`.
          return_recv_hook: whether to leave the receive to the caller.

        Returns:
          [T, hidden] of the buffer's dtype; with `return_recv_hook` a `Hook`, whose call returns
          that.
        """
        hook = Hook(self.combine_recv, self.combine_send(y, layout, weights))
        return hook if return_recv_hook else hook()

    # ------------------------------------------------------------------------------- lifetime

    @property
    def is_closed(self) -> bool:
        """Whether the buffer has been closed, so that its ops raise."""
        return not self._closer.alive

    def check(self) -> None:
        """Raises the fault that the buffer has met, if there was one. Not collective.

        On CPU that is the first fault since the last check; JAX has raised it too, when the
        results of the program were asked for, as `jax.errors.JaxRuntimeError`, or as ValueError
        where a process has one device: catch both, and call this. On GPUs the first fault stays:
        results are NaN where it reached them, and every later check and call raises it. Wait for
        results before the check, which waits for nothing.

        Raises:
          FaultError: always this type, with rank, peer, op, expected and seen.
          RuntimeError: if the buffer is closed.
        """
        self._check_open("check")
        if self._native is None:
            return
        fault = self._native.take_fault(self._id)
        if fault is not None:
            raise FaultError(fault)

    def close(self) -> None:
        """Frees the buffer's memory. Not collective; closing twice does nothing.

        What still waits ends with an error, and so do programs that run this buffer's ops later. A
        buffer that is garbage collected, and was not closed, ends nothing: see "Lifetime" in
        docs/sharp_bits.md. In a forked child it does nothing: the memory and the connections are
        the parent's.
        """
        if self._closer.detach() and self._native is not None and os.getpid() == self._opener:
            self._native.close_buffer(self._id)

    def __enter__(self) -> Buffer:
        self._check_open("with")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def message_bytes(self, device: Any) -> int:
        """Bytes that messages have taken so far on `device`. Not collective.

        Compare with `estimate_memory(config).messages`, on GPUs with `stage` added. 0 for a device
        outside the mesh, and for a mesh of devices that are not there.

        Args:
          device: a `jax.Device` of this process.

        Raises:
          TypeError: if `device` is no `jax.Device`.
          RuntimeError: if the buffer is closed.
        """
        self._check_open("message_bytes")
        if not isinstance(device, jax.Device):
            raise TypeError(f"message_bytes: expected a jax.Device, got {device!r}")
        if self._native is None:
            return 0
        return self._native.message_bytes(self._id, transports.ordinal(device))

    def stats(self) -> BufferStats:
        """What the ranks of this process have exchanged, and waited for, so far. Not collective.

        Counted since the buffer was opened: subtract two snapshots. Waits for no result and no
        kernel (on GPUs it copies a few hundred bytes from each device): what is under way is
        counted in part. Wait for the results of a program first to have all of it.

        Returns:
          `BufferStats`, without ranks for a mesh of devices that are not there.

        Raises:
          RuntimeError: if the buffer is closed, or a device cannot be read.
        """
        self._check_open("stats")
        if self._native is None:
            return BufferStats(())
        return stats.read(self._native, self._id, self.mesh)

    def __copy__(self) -> Buffer:
        """The same buffer, so that a copy of a module that holds it uses it, too."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Buffer:
        return self

    # -------------------------------------------------------------------------------- inside

    def _check_open(self, op: str) -> None:
        if self.is_closed:
            raise RuntimeError(f"{op}: expected an open buffer, got one that is closed")

    def _check_usable(self, op: str) -> None:
        self._check_open(op)
        checks.check_inside(op, self.mesh, self.axes)


def _drop(native: Native | None, buffer_id: int, opener: int) -> None:
    if native is not None and os.getpid() == opener:
        native.drop_buffer(buffer_id)
