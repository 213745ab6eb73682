"""What ranks run in the tests of buffers over GPUs of several processes."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import failing
import groups
import jax
import layers

from jax_sm_free.bootstrap import Bootstrap
from processes import rank


def run_once() -> None:
    """A good run; then all pause."""
    mesh = layers.mesh_of()
    buffer, inputs = layers.open_buffer(mesh), layers.make_inputs(mesh)
    run = layers.on_ranks(mesh, layers.layer_of(buffer, layers.Action()))
    layers.check(run(*inputs), inputs)
    rank.pause("has run once")


@dataclasses.dataclass(frozen=True)
class Failure:
    """What a process saw of a run that failed: what `check` raises, and the seconds it took."""

    fault: str
    ran_s: float
    closed_s: float


def fail_once(how: str, place: str, again: bool) -> Failure:
    """A good run, one in which the last process acts, and a good run on a new buffer.

    Args:
      how: what it does: see `failing.act`.
      place: of `layers.PLACES`.
      again: whether all are there for the last run.
    """
    mesh = layers.mesh_of()
    buffer = layers.open_buffer(mesh, timeout_s=layers.TIMEOUT_S)
    inputs, action = layers.make_inputs(mesh), layers.Action()
    run = layers.on_ranks(mesh, layers.layer_of(buffer, action))
    layers.run_well(run, mesh, inputs)
    if is_last():
        action.place, action.do = place, lambda: failing.act(how, place)
    ran_s = seconds_of(lambda: run(*inputs))
    rank.announce("has failed")
    if how == "raise" and is_last():
        time.sleep(layers.TIMEOUT_S + 1.0)  # The others have given up by then.
    fault = layers.fault_of(buffer)
    closed_s = seconds_of(buffer.close)
    if again:
        layers.check_new_buffer()
    return Failure(fault, ran_s, closed_s)


def fail_in_one_group() -> tuple[str, str]:
    """A good run, and one with a wrong index in the last group; the sum is over all groups.

    Returns:
      What `check` raises then, and what the next run raises.
    """
    mesh = groups.mesh_of(groups_span_processes=True)
    inputs = layers.make_inputs(mesh)
    buffer = layers.open_buffer(mesh, timeout_s=layers.TIMEOUT_S)
    loss = groups.loss_of(layers.layer_of(buffer, layers.Action()))
    run = layers.on_ranks(mesh, loss)
    jax.block_until_ready(run(*inputs))
    wrong = (inputs[0], groups.with_wrong_index(inputs[1]), inputs[2])
    seconds_of(lambda: run(*wrong))
    deadline = time.monotonic() + layers.TIMEOUT_S
    fault = ""
    while not fault and time.monotonic() < deadline:
        fault = layers.fault_of(buffer)
    error, _ = layers.error_and_seconds(lambda: run(*inputs))
    return fault, error


def die_in_start() -> None:
    """The last process dies when all have met, before NVSHMEM connects them."""
    exchange, count = Bootstrap.exchange, itertools.count(1)

    def exchange_and_die(bootstrap: Bootstrap, payload: bytes) -> list[bytes]:
        every = exchange(bootstrap, payload)
        if next(count) == 3:  # Sizes, free numbers, and what NVSHMEM needs.
            os.kill(os.getpid(), signal.SIGKILL)
        return every

    if is_last():
        Bootstrap.exchange = exchange_and_die
    layers.open_buffer(layers.mesh_of())


def close_early() -> Failure | None:
    """The last process closes its buffer when it has run once; the others run again."""
    mesh = layers.mesh_of()
    buffer, inputs = layers.open_buffer(mesh), layers.make_inputs(mesh)
    run = layers.on_ranks(mesh, layers.layer_of(buffer, layers.Action()))
    layers.run_well(run, mesh, inputs)
    if is_last():
        buffer.close()
        return None
    ran_s = seconds_of(lambda: run(*inputs))
    return Failure(layers.fault_of(buffer), ran_s, seconds_of(buffer.close))


def is_last() -> bool:
    return jax.process_index() == jax.process_count() - 1


def seconds_of(run: Callable[[], Any]) -> float:
    """Until its results are there, or its error."""
    start = time.monotonic()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.block_until_ready(run())
    return time.monotonic() - start


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
