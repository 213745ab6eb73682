"""What ranks run in the tests of opening a buffer over several processes: limits, forks, text."""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import resource
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import jax
import layers

from processes import rank

# A child that has not ended by then hangs.
_CHILD_S = 20.0


def error_of_opening() -> tuple[str, float]:
    """What opening a buffer says, which must fail, and the seconds it took."""
    return layers.error_and_seconds(lambda: layers.open_buffer(layers.mesh_of()))


def open_and_log() -> list[str]:
    """A good run on a new buffer, and what opening it has logged."""
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("jax_sm_free")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    layers.check_new_buffer()
    return texts


def open_differently(sizes_of_last: dict[str, Any]) -> str:
    """The last process opens a buffer of other sizes. Then all open one of the same."""
    mesh = layers.mesh_of()
    sizes = sizes_of_last if jax.process_index() == jax.process_count() - 1 else {}
    try:
        layers.open_buffer(mesh, **sizes)
    except ValueError as error:
        text = str(error)
    layers.check_new_buffer()
    return text


def open_without_ucx() -> str:
    """Fails to open where the last process lacks the package, and opens once it has the package."""
    if jax.process_index() == jax.process_count() - 1:
        sys.modules["libucx"] = None
    try:
        layers.open_buffer(layers.mesh_of())
    except (ImportError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}"
    sys.modules.pop("libucx", None)
    layers.check_new_buffer()
    return text


def count_descriptors(num_buffers: int) -> list[int]:
    """How many file descriptors are in use with one buffer open, with two, and so on."""
    mesh, inputs = layers.mesh_of(), layers.make_inputs(layers.mesh_of())
    counts = []
    with contextlib.ExitStack() as stack:
        for _ in range(num_buffers):
            buffer = stack.enter_context(layers.open_buffer(mesh))
            run = layers.on_ranks(mesh, layers.layer_of(buffer, layers.Action()))
            layers.run_well(run, mesh, inputs)
            counts.append(_num_descriptors())
    return counts


def open_with_few_descriptors() -> str:
    """Fails to open where the last process may open few files, and opens once it may open more."""
    jax.devices()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if jax.process_index() == jax.process_count() - 1:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_num_descriptors() + 12, limits[1]))
    error, _ = error_of_opening()
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    layers.check_new_buffer()
    return error


def fork_between_runs() -> list[int]:
    """Children of the first process end, each in its way, while a buffer is open.

    Returns:
      Their exit statuses.
    """
    mesh, inputs = layers.mesh_of(), layers.make_inputs(layers.mesh_of())
    statuses = []
    with layers.open_buffer(mesh) as buffer:
        run = layers.on_ranks(mesh, layers.layer_of(buffer, layers.Action()))
        layers.run_well(run, mesh, inputs)
        if rank.number() == 0:
            # What runs for our buffers when Python exits. JAX's own part would hang in a child.
            at_exit: Callable[[], None] = weakref.finalize._exitfunc  # type: ignore[attr-defined]
            statuses = [_fork(buffer.close), _fork(at_exit), _fork_a_loader(buffer)]
        for _ in range(3):
            layers.check(run(*inputs), inputs)
        buffer.check()
    return statuses


def _fork(act: Callable[[], Any]) -> int:
    child = os.fork()
    if child == 0:
        act()
        os._exit(0)
    end = time.monotonic() + _CHILD_S
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError(f"the child is still there after {_CHILD_S} s")


def _fork_a_loader(buffer: Any) -> int:
    loader = multiprocessing.get_context("fork").Process(target=_load, args=(buffer,))
    loader.start()
    loader.join(_CHILD_S)
    status = loader.exitcode
    if status is None:
        loader.kill()
        raise AssertionError(f"the loader is still there after {_CHILD_S} s")
    return status


def _load(buffer: Any) -> None:
    del buffer
    gc.collect()


def _num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
