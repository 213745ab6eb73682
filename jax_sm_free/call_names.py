"""The names of sends where ranks are in several processes (cc/call_site.h says why)."""

from __future__ import annotations

import collections
import itertools
import secrets
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

# Counts the sends lowered so far in each module. The key lives as long as the module's lowering.
# (The module itself cannot keep a count alive, because jax.export takes that for a host callback.)
_num_sends: weakref.WeakKeyDictionary[Any, Iterator[int]] = weakref.WeakKeyDictionary()

# Counts the lowerings of each call in this process. A program lowers a call once, so that this
# number tells programs apart.
_lowerings: dict[tuple[str, str, str], Iterator[int]] = collections.defaultdict(itertools.count)


def names_of(name: str, buffer: str, ctx: Any) -> dict[str, Any]:
    """The attributes that name a send in the same way in all processes, for its lowering in `ctx`.

    All but one are the same wherever the same program is lowered, so that caches of compiled
    programs still hit. The exception is "lowering", which tells equal programs of this process
    apart. Other processes do not see it.
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
    # A process that loads an exported program has counted lowerings of its own.
    if ctx.module_context.lowering_parameters.for_export:
        return secrets.randbits(62)
    return next(_lowerings[key])
