"""`WireFormat`: how a row of x is written while a dispatch sends it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class WireFormat:
    """The layout of one row on the wire: its values, and behind them its scales, if it has any.

    Attributes:
      dtype: of the values.
      scale_columns: columns of a row that share one scale; 0 for a format without scales.
      scale_dtype: of the scales; None for a format without scales.
      number: by which C++ knows the format (cc/wire_format.h).
    """

    dtype: Any
    scale_columns: int = 0
    scale_dtype: Any = None
    number: int = 0

    @property
    def quantises(self) -> bool:
        """Whether the values are the row's own values divided by a scale."""
        return self.scale_columns > 0

    def num_scales(self, hidden: int) -> int:
        """Scales of a row of `hidden` columns. The last scale may be for fewer columns."""
        return -(-hidden // self.scale_columns) if self.quantises else 0

    def row_bytes(self, hidden: int) -> int:
        """Bytes of a row of `hidden` columns."""
        num_bytes = hidden * self.dtype.itemsize
        if self.quantises:
            num_bytes += self.num_scales(hidden) * self.scale_dtype.itemsize
        return int(num_bytes)


# cc/wire_format.h has the same numbers.
FLOAT8 = WireFormat(jnp.dtype(jnp.float8_e4m3fn), 128, jnp.dtype(jnp.float32), number=1)

# The formats that quantise, by the dtype that `wire_dtype` names.
_FORMATS = {FLOAT8.dtype: FLOAT8}


def check_wire_dtype(name: str, wire_dtype: Any) -> Any:
    """Returns None or a NumPy dtype. Raises TypeError unless a wire format has that dtype."""
    if wire_dtype is None:
        return None
    try:
        checked = jnp.dtype(wire_dtype)
    except TypeError:
        checked = None
    if checked not in _FORMATS:
        names = ", ".join(dtype.name for dtype in _FORMATS)
        raise TypeError(
            f"{name} must be None (rows travel in dtype) or {names}, got "
            f"{wire_dtype if checked is None else checked.name}"
        )
    return checked


def wire_format(dtype: Any, wire_dtype: Any) -> WireFormat:
    """The format of rows of `dtype` in a buffer with `wire_dtype`, where None is no quantising."""
    return WireFormat(dtype) if wire_dtype is None else _FORMATS[wire_dtype]
