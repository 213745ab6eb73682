"""How many rows a rank has room for: by a factor, and a warning where the default is large.

The *balanced load* of a rank is max_tokens * top_k expert rows. Each rank gets so many rows if all
ranks have `max_tokens` tokens and the router spreads them evenly.
"""

from __future__ import annotations

import fractions
import math
import sys
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jax_sm_free.config import Config

# The default warns if it is more than this many times the balanced load.
MUCH = 4


def rows_of_factor(capacity_factor: Any, balanced: int, alignment: int, most: int) -> int:
    """Rows for `capacity_factor` times the balanced load, which has `balanced` rows.

    ceil(capacity_factor * balanced), rounded up to a multiple of `alignment`, and at most `most`.

    Raises:
      TypeError, ValueError: if the factor is not a number above 0, with what was given.
    """
    number = isinstance(capacity_factor, (int, float, np.integer, np.floating))
    if isinstance(capacity_factor, bool) or not number:
        raise TypeError(f"capacity_factor must be a number above 0, got {capacity_factor!r}")
    if not (math.isfinite(capacity_factor) and capacity_factor > 0):
        raise ValueError(f"capacity_factor must be a finite number above 0, got {capacity_factor}")
    # Takes the factor by its decimal digits, because 1.1 * 50 in floats is more than 55.
    rows = math.ceil(fractions.Fraction(str(capacity_factor)) * balanced)
    return min(-(-rows // alignment) * alignment, most)


def warn_of_default(config: Config) -> None:
    """Warns the caller of this package if `config` has much more room than the balanced load."""
    balanced = config.balanced_load
    if config.recv_capacity <= MUCH * balanced:
        return
    row_bytes = config.hidden * config.dtype.itemsize
    rows, few = (
        f"{count} rows ({count * row_bytes / 2**30:.3g} GiB)"
        for count in (config.recv_capacity, balanced)
    )
    warnings.warn(
        f"jax_sm_free: recv.x has room for the worst case, {rows}, which is "
        f"{config.recv_capacity / balanced:.3g} times the balanced load of {few}. Give "
        "capacity_factor=1.25 for room of 1.25 times the balanced load, where rows that do not fit "
        "are dropped and counted in recv.dropped, or another recv_capacity or expert_capacity; "
        f"recv_capacity={config.recv_capacity} keeps the worst case and does not warn",
        UserWarning,
        stacklevel=_frames_of_this_package() + 1,
    )


def _frames_of_this_package() -> int:
    """How many frames of the stack, from the caller of this function on, are of this package."""
    package, count = __name__.partition(".")[0], 0
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        count += 1
        frame = frame.f_back  # type: ignore[assignment]
    return count
