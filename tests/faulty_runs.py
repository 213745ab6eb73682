"""What a run that meets a fault raises, what becomes of its buffer, and which ranks it reached.

On CPU the results of such a run raise the fault. The buffer can be used again, unless it is over
several processes: then it has ended. On GPUs the run has results, which are NaN where the fault
reached them; `check` and every later call raise the fault, and the buffer has ended. A call that
fails on one GPU may raise for all GPUs.
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

# What a program raises when it asks for the results of a run that met a fault. On a single device
# JAX raises ValueError, because it meets the fault before it returns the results.
RUN_ERROR = (jax.errors.JaxRuntimeError, ValueError)


def error_of(run: Callable[..., Any], *args: Any) -> str:
    """The error of a run that must fail; its results raise it."""
    try:
        out = run(*args)
        jax.block_until_ready(out)
    except RUN_ERROR as error:
        return str(error)
    raise AssertionError(
        f"expected the run to fail, got results of shapes {jax.tree.map(np.shape, out)}"
    )


def run_into_fault(run: Callable[..., Any], *args: Any) -> str:
    """The fault that a run must meet. Its results raise it; on GPUs the next call does."""
    if not support.ON_CPU:
        with contextlib.suppress(RUN_ERROR):
            jax.block_until_ready(run(*args))
    return error_of(run, *args)


def fault_of(buffer: smf.Buffer) -> str:
    """The fault that `check` raises: once where buffers go on after a fault, else each time."""
    try:
        buffer.check()
    except smf.FaultError as error:
        if support.BUFFERS_GO_ON:
            buffer.check()
        else:
            with pytest.raises(smf.FaultError, match=re.escape(str(error))):
                buffer.check()
        return str(error)
    raise AssertionError("expected buffer.check() to raise the fault, got no error")


def go_on(
    buffer: smf.Buffer, run: Callable[..., Any], compiled: Callable[..., Any]
) -> tuple[smf.Buffer, Callable[..., Any]]:
    """A buffer and a run to use after a fault: the same ones where buffers go on, else new ones."""
    if support.BUFFERS_GO_ON:
        return buffer, run
    buffer.close()
    where = buffer.mesh, buffer.axes
    buffer = support.open_buffer(buffer.config, *where, node_axis=buffer.node_axis)
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
    """The same as `errors_by_rank`, for one rank of this process."""
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
            # On GPUs the error of a callback comes from here, and not from block_until_ready.
            np.asarray(shard)
        except RUN_ERROR as error:
            errors.append(str(error))
    assert len(errors) in (0, len(shards)), errors
    return errors[0] if errors else None


def _is_poisoned(shards: list[Any]) -> bool:
    """Whether all floats of a rank are NaN. If only some of them are, the test fails."""
    floats = [np.asarray(shard) for shard in shards]
    nan = [np.isnan(a) for a in floats if jnp.issubdtype(a.dtype, jnp.floating) and a.size]
    assert len({bool(value) for a in nan for value in a.flat}) == 1, (
        "expected either all or none of a rank's floats to be NaN"
    )
    return bool(nan[0].all())
