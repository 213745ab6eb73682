"""What sends are called, where ranks are in several processes: cc/call_site.h says why."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np


class _Count:
    """Sends lowered so far in a module."""

    def __init__(self) -> None:
        self.value = -1

    @classmethod
    def next_in(cls, module: Any) -> int:
        """The number of one more send; kept with what the module keeps alive."""
        found = [kept for kept in module.keepalives if isinstance(kept, cls)]
        if not found:
            found = [cls()]
            module.keepalives.append(found[0])
        found[0].value += 1
        return found[0].value


# Lowerings of each call in this process. A program lowers a call once, so they tell programs apart.
_lowerings: dict[tuple[int, str, str], Iterator[int]] = collections.defaultdict(itertools.count)


def names_of(name: str, buffer_id: int, ctx: Any) -> dict[str, Any]:
    """The attributes by which all processes call a send alike, for its lowering in `ctx`.

    The same wherever the same program is lowered, so that caches of compiled programs still hit;
    but for "lowering", which tells equal programs of this process apart and no other process sees.
    """
    number = _Count.next_in(ctx.module_context)
    program = ctx.module_context.module.operation.attributes["sym_name"].value
    operands = ", ".join(f"{aval.dtype}{list(aval.shape)}" for aval in ctx.avals_in)
    call = f"{name} {number} ({operands})"
    return {
        "program": program,
        "lowering": np.int64(next(_lowerings[buffer_id, program, call])),
        "call_number": np.int64(number),
        "call": call,
    }
