"""Frozen configuration of a buffer, the sizes that follow from it, and the memory it takes.

Nothing here touches a device: everything can be asked before anything is allocated.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_sm_free import capacity

MAX_TOP_K = 32
MAX_NUM_SLOTS = 64
MAX_TIMEOUT_S = 1e6
DTYPES = ("bfloat16", "float16", "float32")

# Of a float8 wire; cc/quantized.h has the same numbers.
SCALE_COLUMNS = 128
MIN_AMAX = 1e-4
MAX_FLOAT8 = 448.0

# A message is one header, then int32/float32 routing arrays, then the rows; every part starts on
# a boundary of this many bytes. The byte tables themselves are in cc/layout.h.
_PART_ALIGNMENT = 64
_ROW_ALIGNMENT = 16
_HEADER_BYTES = 64


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def check_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int; TypeError or ValueError if it is none, or out of bounds."""
    bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer {bounds}, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {bounds}, got {value}")
    if value > np.iinfo(np.int32).max:
        raise ValueError(f"{name} must fit int32, got {value}")
    return int(value)


def _check_dtype(dtype: Any) -> Any:
    try:
        checked = None if dtype is None else jnp.dtype(dtype)  # NumPy takes None for float64
    except TypeError:
        checked = None
    if checked is None or checked.name not in DTYPES:
        got = repr(dtype) if checked is None else checked.name
        raise TypeError(f"dtype must be one of {', '.join(DTYPES)}, got {got}")
    return checked


def _check_timeout(timeout_s: Any) -> float:
    bounds = f"in (0, {MAX_TIMEOUT_S}]"
    number = isinstance(timeout_s, (int, float, np.integer, np.floating))
    if isinstance(timeout_s, bool) or not number:
        raise TypeError(f"timeout_s must be a number {bounds}, got {timeout_s!r}")
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise ValueError(f"timeout_s must be {bounds}, got {timeout_s}")
    return float(timeout_s)


def _check_wire_dtype(wire_dtype: Any) -> Any:
    if wire_dtype is None:
        return None
    try:
        checked = jnp.dtype(wire_dtype)
    except TypeError:
        checked = None
    if checked != jnp.float8_e4m3fn:
        raise TypeError(
            "wire_dtype must be None (rows travel in dtype) or float8_e4m3fn, got "
            f"{wire_dtype if checked is None else checked.name}"
        )
    return checked


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of one expert-parallel group. Frozen and hashable.

    `recv_capacity` is always a number here. With `dataclasses.replace`, which hands that number on,
    say `recv_capacity=None` to have it follow from the new sizes.

    Attributes:
      ep_size: ranks in the group.
      hidden: columns of a row.
      num_experts: experts of the whole group; a multiple of `ep_size`.
      top_k: experts a token names, 1 to 32 (-1 in `topk_idx` for fewer).
      max_tokens: tokens per rank and call, at most.
      recv_capacity: expert rows a rank can receive. None becomes `worst_case_capacity`, or what
        `capacity_factor` says.
      num_slots: exchanges that may be in flight at once, 1 to 64.
      expert_alignment: every expert's group is padded to a multiple of this many rows.
      expert_capacity: rows of every expert's group, whatever it gets: what is more is dropped, what
        is less is padded. `recv_capacity` is then num_local_experts times as much. None: groups
        are as large as they need to be.
      dtype: bfloat16, float16 or float32; the dtype of rows that are summed.
      timeout_s: seconds a receive waits for its peers before it is a fault.
      wire_dtype: None, or float8_e4m3fn for rows that dispatch quantises (below).

    `capacity_factor` is an argument alone. It sets `recv_capacity` to capacity_factor *
    `balanced_load` rows, rounded up to whole rows and to `expert_alignment`, and never above
    `worst_case_capacity`. The padding of groups takes place among these rows.

    With `wire_dtype=float8_e4m3fn` a dispatch sends each row of x as `hidden` values of one byte
    and ceil(hidden / 128) scales of four; recv.x is in `dtype` again. For each 128 columns of a row
    (the last group may be shorter), in float32, each operation IEEE and rounded to nearest:

        amax  = max(max |x|, 1e-4)
        scale = amax / 448                           448 is the largest float8_e4m3fn
        value = float8_e4m3fn(x / scale)             ties to even; never beyond 448
        recv.x = dtype(float32(value) * scale)

    The scales are those of DeepEP's per-token cast (https://github.com/deepseek-ai/DeepEP,
    tests/utils.py, per_token_cast_to_fp8), which multiplies by 448 / amax where this divides.
    The bits are the same on every platform and in `reference`. A group with
    a NaN or an infinity arrives as NaN, all of it. Only the rows of the forward dispatch are
    quantised: combine, and the gradients of both, travel in `dtype`, and the gradient passes the
    quantisation as if it were the identity.

    Raises:
      TypeError, ValueError: for a value out of range, naming it and the range; for a
        `capacity_factor` beside a `recv_capacity` or an `expert_capacity`.
    """

    ep_size: int
    hidden: int
    num_experts: int
    top_k: int
    max_tokens: int
    recv_capacity: Any = None  # an int; None stands for the worst case
    num_slots: int = 2
    expert_alignment: int = 1
    expert_capacity: int | None = None
    dtype: Any = jnp.bfloat16
    timeout_s: float = 100.0
    wire_dtype: Any = None
    capacity_factor: dataclasses.InitVar[Any] = None

    def __post_init__(self, capacity_factor: Any) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("ep_size", check_int("ep_size", self.ep_size, 1))
        put("hidden", check_int("hidden", self.hidden, 1))
        put("num_experts", check_int("num_experts", self.num_experts, 1))
        put("top_k", check_int("top_k", self.top_k, 1, MAX_TOP_K))
        put("max_tokens", check_int("max_tokens", self.max_tokens, 1))
        put("num_slots", check_int("num_slots", self.num_slots, 1, MAX_NUM_SLOTS))
        put("expert_alignment", check_int("expert_alignment", self.expert_alignment, 1))
        if self.num_experts % self.ep_size:
            raise ValueError(
                f"num_experts ({self.num_experts}) must be divisible by ep_size ({self.ep_size}); "
                f"padded_num_experts gives {round_up(self.num_experts, self.ep_size)}"
            )
        put("dtype", _check_dtype(self.dtype))
        put("wire_dtype", _check_wire_dtype(self.wire_dtype))
        put("timeout_s", _check_timeout(self.timeout_s))
        if capacity_factor is not None:
            put("recv_capacity", self._rows_of_factor(capacity_factor))
        elif self.expert_capacity is not None:
            put("expert_capacity", check_int("expert_capacity", self.expert_capacity, 1))
            self._check_fixed_groups(self.num_local_experts * self.expert_capacity)
            put("recv_capacity", self.num_local_experts * self.expert_capacity)
        elif self.recv_capacity is None:
            put("recv_capacity", self.worst_case_capacity)
        put("recv_capacity", check_int("recv_capacity", self.recv_capacity, 0))
        # Counts are of all that tokens name, each expert as often as they name it.
        named = self.max_recv_tokens * self.top_k
        if max(self.recv_capacity, self.worst_case_capacity, named) > np.iinfo(np.int32).max:
            raise ValueError(
                f"expert rows per rank must fit int32, got {self.recv_capacity} "
                f"(worst case {self.worst_case_capacity}; the group's tokens name {named})"
            )

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
    def balanced_load(self) -> int:
        """Expert rows of a rank where all ranks have `max_tokens` and the router spreads evenly."""
        return self.max_tokens * self.top_k

    @property
    def worst_case_capacity(self) -> int:
        """Expert rows a rank receives at most from tokens that name no expert twice.

        Every token of every rank then names as many of the rank's experts as it can: ep_size *
        max_tokens * min(top_k, num_local_experts) rows, and up to expert_alignment - 1 rows of
        padding for each group.
        """
        rows = self.max_recv_tokens * min(self.top_k, self.num_local_experts)
        padding = min(self.num_local_experts, rows) * (self.expert_alignment - 1)
        return (rows + padding) // self.expert_alignment * self.expert_alignment

    @property
    def max_recv_tokens(self) -> int:
        """Token rows a rank receives at most: one for every token of the group."""
        return self.ep_size * self.max_tokens

    @property
    def dispatched_row_bytes(self) -> int:
        """Bytes of a row of x as a dispatch sends it, in `dtype` or in `wire_dtype` with scales."""
        if self.wire_dtype is None:
            return self._dtype_row_bytes
        return self.hidden + 4 * -(-self.hidden // SCALE_COLUMNS)

    @property
    def row_bytes(self) -> int:
        """Bytes of the widest row that travels; combine's, `hidden` values of `dtype`.

        Also with a `wire_dtype`. (With four columns and less the scales can make that row wider.)
        """
        return max(self._dtype_row_bytes, self.dispatched_row_bytes)

    @property
    def _dtype_row_bytes(self) -> int:
        return self.hidden * self.dtype.itemsize

    @property
    def message_bytes(self) -> int:
        """Bytes of the largest message from one rank to another (cc/layout.h has the table)."""
        entries = self.max_tokens * self.top_k
        parts = (
            _HEADER_BYTES,
            4 * self.num_local_experts,  # rows per expert
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
            "float8_wire": self.wire_dtype is not None,
        }


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per rank; `total` is their sum.

    Attributes:
      messages: messages to this rank of `num_slots` exchanges in flight, all of the largest size:
        with rows in `dtype`, whatever the `wire_dtype`, because combine sends those. They live
        outside XLA's memory. On CPU they are taken only as far as rows are really sent,
        and each of the four kinds of exchange (dispatch, combine and the gradients of both) has
        `num_slots` of its own, so that a program with all of them in flight at once can take more.
        On GPUs all is taken when the buffer is made.
      stage: the same for messages that leave this rank. On GPUs alone: on CPU a packed message is
        handed over.
      recv: the result of one `dispatch_recv(output="experts")`, in XLA's memory: rows, weights,
        group sizes, counts and the layout.
    """

    messages: int
    stage: int
    recv: int

    @property
    def total(self) -> int:
        """Bytes of all three."""
        return self.messages + self.stage + self.recv


def _check_config(op: str, config: Any) -> None:
    if not isinstance(config, Config):
        raise TypeError(f"{op}: expected a Config, got {type(config).__name__}")


def estimate_memory(config: Config) -> MemoryEstimate:
    """Bytes a rank needs, before anything is allocated. Not collective.

    Args:
      config: the sizes; `Buffer(...).config`, or a `Config` made by hand.

    Returns:
      What follows from the sizes alone, whatever is routed where.

    Raises:
      TypeError: if `config` is no `Config`.
    """
    _check_config("estimate_memory", config)
    recv = (
        config.recv_capacity * (config.hidden * config.dtype.itemsize + 4)  # rows, their weights
        + 4 * (2 * config.num_local_experts + 1)  # group_sizes, counts, dropped
        + 4 * (config.max_recv_tokens * config.top_k + config.ep_size)  # layout
    )
    return MemoryEstimate(
        messages=config.num_slots * config.ep_size * config.message_bytes,
        stage=get_rdma_size_hint(config),
        recv=recv,
    )


def get_rdma_size_hint(config: Config) -> int:
    """Bytes of one rank's messages that may cross a NIC: those to the other ranks. Not collective.

    Args:
      config: as for `estimate_memory`.

    Returns:
      num_slots * (ep_size - 1) times the bytes of the largest message.

    Raises:
      TypeError: if `config` is no `Config`.
    """
    _check_config("get_rdma_size_hint", config)
    return config.num_slots * (config.ep_size - 1) * config.message_bytes
