"""The extension: its buffers, and its handlers for XLA. No other module imports it."""

from __future__ import annotations

import functools
import importlib
import os
import weakref
from collections.abc import Callable
from typing import Any

import jax

from jax_sm_free.config import Config


class Native:
    """The extension module of one platform, "cpu" or "cuda", with its handlers registered.

    Attributes:
      module: the extension itself. The file of a transport calls the functions that only this
        transport needs; the methods here are for all.
    """

    def __init__(self, platform: str) -> None:
        self.module = _load(platform)
        register = {"cpu": register_cpu, "cuda": register_cuda}[platform]
        register()

    def open_buffer(
        self, config: Config, places: list[tuple[int, int, int] | None], name: str
    ) -> int:
        """Makes the memory of a buffer.

        Args:
          config: the sizes.
          places: each device's (group, rank, mesh position).
          name: by which programs find the buffer.
        """
        return int(self.module.open_buffer(name, config.sizes(), places))

    def lowest_free_id(self) -> int:
        """The lowest number above the numbers of all buffers so far."""
        return int(self.module.lowest_free_id())

    def close_buffer(self, buffer_id: int) -> None:
        """Frees a buffer; a recv that waits on it ends with an error. May be called twice."""
        self.module.close_buffer(buffer_id)

    def drop_buffer(self, buffer_id: int) -> None:
        """Frees a buffer as soon as no program may still run on it."""
        self.module.drop_buffer(buffer_id)

    def take_fault(self, buffer_id: int) -> str | None:
        """The first fault since the last call, if there was one."""
        fault = self.module.take_fault(buffer_id)
        return None if fault is None else str(fault)

    def message_bytes(self, buffer_id: int, device: int) -> int:
        """Bytes of messages that a device's rank has taken so far, in use or kept for reuse."""
        return int(self.module.message_bytes(buffer_id, device))

    def stats(self, buffer_id: int, device: int) -> dict[str, Any]:
        """What the rank of a device has counted: the fields of `RankStats`, with nanoseconds."""
        return dict(self.module.stats(buffer_id, device))


@functools.cache
def _load(platform: str) -> Any:
    try:
        module = importlib.import_module(f"jax_sm_free._{platform}")
        # Closes all open buffers when Python ends, so that the peers of this process hear of it.
        weakref.finalize(module, _close_all, module.close_all, os.getpid())
        return module
    except ImportError as error:
        raise NotImplementedError(
            f"expected jax_sm_free to be built for {platform} devices, got a build without: {error}"
        ) from error


def _close_all(close_all: Callable[[], None], opener: int) -> None:
    # A forked child has the module, but not the threads and connections of the buffers. These
    # belong to the parent process, which still uses them.
    if os.getpid() == opener:
        close_all()


@functools.cache
def register_cpu() -> None:
    """Registers the handlers of platform "cpu". JAX's CPU backend must have been started."""
    module = _load("cpu")
    jax.ffi.register_ffi_type("smf_call_site", module.call_site_type(), platform="cpu")
    for name, stages in module.handlers().items():
        jax.ffi.register_ffi_target(name, stages, platform="cpu")


@functools.cache
def register_cuda() -> None:
    """Registers handlers of platform "CUDA". A build without CUDA has some that only compile."""
    try:
        handlers = _load("cuda").handlers()
    except NotImplementedError:
        handlers = _load("cpu").cuda_handlers()
    for name, stages in handlers.items():
        jax.ffi.register_ffi_target(name, stages, platform="CUDA")
