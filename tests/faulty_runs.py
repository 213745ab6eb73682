"""What runs that meet a fault raise, leave behind, and tell of each rank.

On CPU the results of a run that met a fault raise it, and its buffer goes on, but for one over
several processes, which has come to its end. On GPUs the results are there, NaN where the fault
reached them; `check` and every later call raise it, and the buffer has come to its end. A call
that fails on one GPU while others go on may raise for all of them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_sm_free as smf

# What a run that met a fault raises when its results are asked for; ValueError where JAX found out
# before it returned them, as it does on a single device.
RUN_ERROR = (jax.errors.JaxRuntimeError, ValueError)


def error_of(run: Callable[..., Any], *args: Any) -> str:
    """The message that a run which must fail raises, when its results are asked for."""
    try:
        out = run(*args)
        jax.block_until_ready(out)
    except RUN_ERROR as error:
        return str(error)
    raise AssertionError(f"expected the run to fail, but it gave {jax.tree.map(np.shape, out)}")


def run_into_fault(run: Callable[..., Any], *args: Any) -> str:
    """The fault that a run must meet, as its results raise it; on GPUs, as the next call does."""
    if not support.ON_CPU:
        with contextlib.suppress(RUN_ERROR):
            jax.block_until_ready(run(*args))
    return error_of(run, *args)


def fault_of(buffer: smf.Buffer) -> str:
    """The fault that `check` raises: on CPU once, and then no more; on GPUs each time."""
    try:
        buffer.check()
    except smf.FaultError as error:
        if support.BUFFERS_GO_ON:
            buffer.check()
        else:
            with pytest.raises(smf.FaultError, match=re.escape(str(error))):
                buffer.check()
        return str(error)
    raise AssertionError("expected buffer.check() to raise the fault, but it did not")


def go_on(
    buffer: smf.Buffer, run: Callable[..., Any], compiled: Callable[..., Any]
) -> tuple[smf.Buffer, Callable[..., Any]]:
    """Buffer and run to use after a fault: the same where they go on, else others."""
    if support.BUFFERS_GO_ON:
        return buffer, run
    buffer.close()
    buffer = support.open_buffer(buffer.config, buffer.mesh)
    return buffer, compiled(buffer)


def errors_by_rank(buffer: smf.Buffer, run: Callable[..., Any], *args: Any) -> list[str | None]:
    """For each rank the error that all of its results carry, or None.

    A rank whose results are poisoned carries the buffer's fault.
    """
    ranks = range(buffer.config.ep_size)
    try:
        out = run(*args)
    except RUN_ERROR as error:
        return [str(error) for _ in ranks]
    return [error_of_rank(buffer, out, rank) for rank in ranks]


def error_of_rank(buffer: smf.Buffer, out: Any, rank: int) -> str | None:
    """Of a rank of this process: see `errors_by_rank`."""
    error = _error_of_shards(_shards_of_rank(out, rank))
    if error or support.ON_CPU:
        return error
    return fault_of(buffer) if _is_poisoned(_shards_of_rank(out, rank)) else None


def _shards_of_rank(out: Any, rank: int) -> list[Any]:
    shards = [shard for leaf in jax.tree.leaves(out) for shard in leaf.addressable_shards]
    return [shard.data for shard in shards if (shard.index[0].start or 0) == rank]


def _error_of_shards(shards: list[Any]) -> str | None:
    errors = []
    for shard in shards:
        try:
            shard.block_until_ready()
            # On GPUs it raises what block_until_ready lets pass: a callback's error.
            np.asarray(shard)
        except RUN_ERROR as error:
            errors.append(str(error))
    assert len(errors) in (0, len(shards)), errors
    return errors[0] if errors else None


def _is_poisoned(shards: list[Any]) -> bool:
    """Whether all floats of a rank are NaN. Some of them being NaN is an error of its own."""
    floats = [np.asarray(shard) for shard in shards]
    nan = [np.isnan(a) for a in floats if jnp.issubdtype(a.dtype, jnp.floating) and a.size]
    assert len({bool(value) for a in nan for value in a.flat}) == 1, "the rank is half poisoned"
    return bool(nan[0].all())
