"""What ranks run in the tests of buffers over GPUs of several processes."""

from __future__ import annotations

import contextlib
import subprocess
import time
from typing import Any

import jax
import layers
import rank


def die_and_time_out() -> tuple[str, float, float]:
    """A good run; then the last process pauses, for the test to kill it, and the others run again.

    Returns:
      The fault, the seconds until the results were there, and those that closing took.
    """
    mesh = layers.mesh_of()
    buffer, inputs = layers.open_buffer(mesh), layers.make_inputs(mesh)
    run = layers.on_ranks(mesh, layers.layer_of(buffer, layers.Action()))
    layers.check(run(*inputs), inputs)
    rank.pause("has run once")
    start = time.monotonic()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # Where a call came behind the fault.
        jax.block_until_ready(run(*inputs))
    ran = time.monotonic()
    fault = layers.fault_of(buffer)
    buffer.close()
    return fault, ran - start, time.monotonic() - ran


def open_often(times: int) -> list[int]:
    """Two buffers, opened and dropped in another order by each process; the memory in use after.

    Returns:
      Bytes in use on this GPU by all processes, after each time.
    """
    mesh = layers.mesh_of()
    in_use = []
    for _ in range(times):
        buffers = [layers.open_buffer(mesh, num_slots=slots) for slots in (2, 3)]
        inputs = layers.make_inputs(mesh)
        for buffer in buffers:
            run = layers.on_ranks(mesh, layers.layer_of(buffer, layers.Action()))
            layers.check(run(*inputs), inputs)
        for buffer in buffers[:: 1 - 2 * (jax.process_index() % 2)]:
            buffer.close()
        in_use.append(memory_in_use())
    return in_use


def memory_in_use() -> int:
    query = ["nvidia-smi", f"--id={rank.number()}", "--query-gpu=memory.used"]
    used = subprocess.check_output([*query, "--format=csv,noheader,nounits"], text=True)
    return int(used) << 20


def open_refused(**sizes: Any) -> str:
    """The error of an opening that must fail."""
    try:
        layers.open_buffer(layers.mesh_of(), **sizes)
    except (ValueError, RuntimeError) as error:
        return str(error)
    raise AssertionError("expected the buffer not to open")
