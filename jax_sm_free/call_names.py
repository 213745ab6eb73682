"""What sends are called, where ranks are in several processes: cc/call_site.h says why."""

from __future__ import annotations

import collections
import itertools
import secrets
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

# Sends lowered so far in each module, by something that lives as long as its lowering. (What a
# module keeps alive would do, too, but jax.export takes all of that for callbacks of the host.)
_num_sends: weakref.WeakKeyDictionary[Any, Iterator[int]] = weakref.WeakKeyDictionary()

# Lowerings of each call in this process. A program lowers a call once, so they tell programs apart.
_lowerings: dict[tuple[str, str, str], Iterator[int]] = collections.defaultdict(itertools.count)


def names_of(name: str, buffer: str, ctx: Any) -> dict[str, Any]:
    """The attributes by which all processes call a send alike, for its lowering in `ctx`.

    The same wherever the same program is lowered, so that caches of compiled programs still hit;
    but for "lowering", which tells equal programs of this process apart and no other process sees.
    """
    number = next(_num_sends.setdefault(ctx.module_context.shape_poly_state, itertools.count()))
    program = ctx.module_context.module.operation.attributes["sym_name"].value
    operands = ", ".join(f"{aval.dtype}{list(aval.shape)}" for aval in ctx.avals_in)
    call = f"{name} {number} ({operands})"
    return {
        "program": program,
        "lowering": np.int64(_lowering(ctx, (buffer, program, call))),
        "call_number": np.int64(number),
        "call": call,
    }


def _lowering(ctx: Any, key: tuple[str, str, str]) -> int:
    # What is exported may be loaded in a process that has counted lowerings of its own.
    if ctx.module_context.lowering_parameters.for_export:
        return secrets.randbits(62)
    return next(_lowerings[key])
