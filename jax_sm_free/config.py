"""`Config`: the sizes of a buffer, and the sizes that follow from them.

Nothing here touches a device: everything can be asked before anything is allocated.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_sm_free import capacity
from jax_sm_free.bounds import (
    DTYPES,
    MAX_NUM_SLOTS,
    MAX_TOP_K,
    check_dtype,
    check_seconds,
    checked_by,
    int_in,
    int_or_none,
)
from jax_sm_free.wire_format import WireFormat, check_wire_dtype, wire_format

# A message is one header, then int32 and float32 routing arrays, then the rows. Every part starts
# on a boundary of this many bytes. The byte tables themselves are in cc/layout.h.
_PART_ALIGNMENT = 64
_ROW_ALIGNMENT = 16
_HEADER_BYTES = 64


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of one expert-parallel group. Frozen and hashable.

    `recv_capacity` is always a number in a `Config`, and `dataclasses.replace` hands it on. Give
    `recv_capacity=None` to `replace`, too, to have the capacity follow from the new sizes.

    Attributes:
      ep_size: ranks in the group; at most 32 on GPUs.
      hidden: columns of a row.
      num_experts: experts of the whole group; a multiple of `ep_size`, and at most 32767 - ep_size
        on GPUs.
      top_k: experts that a token names, 1 to 32. A token that names fewer has -1 in `topk_idx`.
      max_tokens: tokens per rank and call, at most.
      recv_capacity: expert rows that a rank can receive. None stands for `worst_case_capacity`,
        or for the rows that `capacity_factor` gives.
      num_slots: exchanges that may be in flight at once, 1 to 64.
      expert_alignment: every expert's group is padded to a multiple of this many rows.
      expert_capacity: rows of every expert's group. Rows that a group has no place for are
        dropped, and places without a row are padding. `recv_capacity` is then num_local_experts
        times as much. None makes each group as large as its rows need.
      dtype: bfloat16, float16 or float32; the dtype of rows that are summed.
      timeout_s: seconds that a receive waits for its peers before it reports a fault.
      wire_dtype: None, or float8_e4m3fn for rows that dispatch quantises, as described below.
      num_nodes: nodes that share the ranks evenly. One node makes one tier: each rank sends to each
        other rank. Several nodes make two tiers: between nodes a rank sends to the ranks of its
        rail only, and ranks of the same node send on what is for each other.
      node_stride: ranks r and r + node_stride have the same place on neighbouring nodes. Rank r is
        on node r // node_stride % num_nodes. None stands for ep_size // num_nodes, which puts
        neighbouring ranks on the same node. With one node it is always `ep_size`.

    `capacity_factor` is an argument, and no attribute. It sets `recv_capacity` to capacity_factor *
    `balanced_load` rows, rounded up to whole rows and to `expert_alignment`, and never above
    `worst_case_capacity`. The padding of groups takes some of these rows.

    With `wire_dtype=float8_e4m3fn` a dispatch sends each row of x as `hidden` values of one byte
    and ceil(hidden / 128) scales of four bytes each. recv.x is in `dtype` again. The arithmetic is
    that of float32, for each 128 columns of a row (or fewer, at the end of the row). Each operation
    is as in IEEE 754, rounded to nearest:

        amax  = max(max |x|, 1e-4)
        scale = amax / 448                           448 is the largest float8_e4m3fn
        value = float8_e4m3fn(x / scale)             ties to even; at most 448
        recv.x = dtype(float32(value) * scale)

    The scales are those of DeepEP's per-token cast (https://github.com/deepseek-ai/DeepEP,
    tests/utils.py, per_token_cast_to_fp8), but for a rounding: DeepEP multiplies by 448 / amax, and
    this divides by the scale. The bits are the same on every platform and in `reference`. Where one
    of 128 columns is a NaN or an infinity, all 128 arrive as NaN. Only the rows of the forward
    dispatch are quantised. The rows of a combine, and the gradients of both, travel in `dtype`. The
    gradient passes the quantisation as if it were the identity.

    Raises:
      TypeError, ValueError: for a value out of range, with the value and the range in the text;
        for a `capacity_factor` beside a `recv_capacity` or an `expert_capacity`.
    """

    ep_size: int = field(metadata=int_in(1))
    hidden: int = field(metadata=int_in(1))
    num_experts: int = field(metadata=int_in(1))
    top_k: int = field(metadata=int_in(1, MAX_TOP_K))
    max_tokens: int = field(metadata=int_in(1))
    # An int as soon as `__post_init__` has replaced None.
    recv_capacity: Any = field(default=None, metadata=int_or_none(0))
    num_slots: int = field(default=2, metadata=int_in(1, MAX_NUM_SLOTS))
    expert_alignment: int = field(default=1, metadata=int_in(1))
    expert_capacity: int | None = field(default=None, metadata=int_or_none(1))
    dtype: Any = field(default=jnp.bfloat16, metadata=checked_by(check_dtype))
    timeout_s: float = field(default=100.0, metadata=checked_by(check_seconds))
    wire_dtype: Any = field(default=None, metadata=checked_by(check_wire_dtype))
    num_nodes: int = field(default=1, metadata=int_in(1))
    # An int as soon as `__post_init__` has replaced None.
    node_stride: Any = field(default=None, metadata=int_or_none(1))
    capacity_factor: dataclasses.InitVar[Any] = None

    def __post_init__(self, capacity_factor: Any) -> None:
        for size in dataclasses.fields(self):
            self._set(size.name, size.metadata["check"](size.name, getattr(self, size.name)))
        if self.num_experts % self.ep_size:
            raise ValueError(
                f"num_experts ({self.num_experts}) must be divisible by ep_size ({self.ep_size}); "
                f"padded_num_experts gives {round_up(self.num_experts, self.ep_size)}"
            )
        self._set("node_stride", self._resolved_stride())
        self._set("recv_capacity", self._resolved_capacity(capacity_factor))
        # Each expert counts as often as tokens name it.
        named = self.max_recv_tokens * self.top_k
        if max(self.recv_capacity, self.worst_case_capacity, named) > np.iinfo(np.int32).max:
            raise ValueError(
                f"expert rows per rank must fit int32, got {self.recv_capacity} "
                f"(worst case {self.worst_case_capacity}; the group's tokens name {named})"
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # The class is frozen.

    def _resolved_stride(self) -> int:
        """The number that `node_stride` stands for. Raises unless all nodes are of one size."""
        if self.ep_size % self.num_nodes:
            raise ValueError(
                f"ep_size ({self.ep_size}) must be divisible by num_nodes ({self.num_nodes})"
            )
        if self.num_nodes == 1 or self.node_stride is None:
            return self.node_size
        if self.node_size % self.node_stride:
            raise ValueError(
                f"ep_size ({self.ep_size}) must be divisible by num_nodes * node_stride "
                f"({self.num_nodes} * {self.node_stride})"
            )
        return int(self.node_stride)

    def _resolved_capacity(self, capacity_factor: Any) -> int:
        """The rows that `recv_capacity` stands for."""
        if capacity_factor is not None:
            return self._rows_of_factor(capacity_factor)
        if self.expert_capacity is not None:
            num_rows = self.num_local_experts * self.expert_capacity
            self._check_fixed_groups(num_rows)
            return num_rows
        if self.recv_capacity is None:
            return self.worst_case_capacity
        return int(self.recv_capacity)

    def _rows_of_factor(self, capacity_factor: Any) -> int:
        for name in ("recv_capacity", "expert_capacity"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"expected capacity_factor or {name}, got capacity_factor={capacity_factor} "
                    f"and {name}={getattr(self, name)}"
                )
        return capacity.rows_of_factor(
            capacity_factor, self.balanced_load, self.expert_alignment, self.worst_case_capacity
        )

    def _check_fixed_groups(self, num_rows: int) -> None:
        if self.recv_capacity not in (None, num_rows):
            raise ValueError(
                f"recv_capacity must be None or {num_rows} (num_local_experts * expert_capacity) "
                f"with an expert_capacity, got {self.recv_capacity}"
            )
        if self.expert_alignment != 1:
            raise ValueError(
                f"expert_alignment must be 1 with an expert_capacity, got {self.expert_alignment}"
            )

    @property
    def num_local_experts(self) -> int:
        """Experts on each rank."""
        return self.num_experts // self.ep_size

    @property
    def node_size(self) -> int:
        """Ranks on each node."""
        return self.ep_size // self.num_nodes

    @property
    def balanced_load(self) -> int:
        """Expert rows of a rank if all ranks have `max_tokens` and the router spreads evenly."""
        return self.max_tokens * self.top_k

    @property
    def worst_case_capacity(self) -> int:
        """The most expert rows that a rank receives from tokens that name no expert twice.

        Every token of every rank then names as many of the rank's experts as it can: ep_size *
        max_tokens * min(top_k, num_local_experts) rows, and up to expert_alignment - 1 rows of
        padding for each group.
        """
        rows = self.max_recv_tokens * min(self.top_k, self.num_local_experts)
        padding = min(self.num_local_experts, rows) * (self.expert_alignment - 1)
        return (rows + padding) // self.expert_alignment * self.expert_alignment

    @property
    def max_recv_tokens(self) -> int:
        """The most token rows that a rank receives: one for every token of the group."""
        return self.ep_size * self.max_tokens

    @property
    def max_node_tokens(self) -> int:
        """Token rows of the messages to a rank from all nodes, one message of each node."""
        return self.num_nodes * self.max_tokens

    @property
    def wire(self) -> WireFormat:
        """How a dispatch sends a row of x."""
        return wire_format(self.dtype, self.wire_dtype)

    @property
    def dispatched_row_bytes(self) -> int:
        """Bytes of a row of x as a dispatch sends it, in `dtype` or in `wire_dtype` with scales."""
        return self.wire.row_bytes(self.hidden)

    @property
    def row_bytes(self) -> int:
        """Bytes of the widest row that travels.

        That is a row of a combine, `hidden` values of `dtype`, whatever the `wire_dtype`. Only with
        four columns or fewer can the scales of a `wire_dtype` make the row of a dispatch wider.
        """
        return max(self.hidden * self.dtype.itemsize, self.dispatched_row_bytes)

    @property
    def message_bytes(self) -> int:
        """Bytes of the largest message from one rank to another (cc/layout.h has the table)."""
        return self._bytes_of_message(self.num_local_experts)

    @property
    def rail_message_bytes(self) -> int:
        """Bytes of the largest message that crosses from one node to another.

        It is a message as any other, but for all experts of a node.
        """
        return self._bytes_of_message(self.node_size * self.num_local_experts)

    def _bytes_of_message(self, num_experts: int) -> int:
        """Bytes of a message of `max_tokens` rows for a place that has `num_experts` experts."""
        entries = self.max_tokens * self.top_k
        parts = (
            _HEADER_BYTES,
            4 * num_experts,  # rows per expert
            4 * entries,  # local expert of each (token row, k)
            4 * entries,  # position within the (source, expert) run
            4 * entries,  # weight
            4 * self.max_tokens,  # number of each row, where rows are common
            self.max_tokens * round_up(self.row_bytes, _ROW_ALIGNMENT),
        )
        return sum(round_up(part, _PART_ALIGNMENT) for part in parts)

    def sizes(self) -> dict[str, int | float]:
        """The numbers that the extension takes, by name (cc/config.h)."""
        names = (
            "ep_size",
            "num_experts",
            "top_k",
            "max_tokens",
            "recv_capacity",
            "num_slots",
            "expert_alignment",
            "row_bytes",
            "timeout_s",
        )
        sizes = {name: getattr(self, name) for name in names}
        return sizes | {
            "expert_capacity": self.expert_capacity or 0,
            "wire_format": self.wire.number,
            "dtype": DTYPES[self.dtype.name],
            "num_nodes": self.num_nodes,
            "node_stride": self.node_stride,
        }
