"""The extension, of which this is the only importer: its buffers, and its handlers for XLA."""

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
    """The extension module of one platform, "cpu" or "cuda", with its handlers registered."""

    def __init__(self, platform: str) -> None:
        self._module = _load(platform)
        register = {"cpu": register_cpu, "cuda": register_cuda}[platform]
        register()

    def open_buffer(
        self, config: Config, places: list[tuple[int, int, int] | None], name: str
    ) -> int:
        """Makes the memory of a buffer.

        Args:
          config: the sizes.
          places: each device's (group, rank, mesh position).
          name: by which programs find it.
        """
        return int(self._module.open_buffer(name, config.sizes(), places))

    def lowest_free_id(self) -> int:
        """The lowest number above those of all buffers so far."""
        return int(self._module.lowest_free_id())

    def find_wire(self, key: str) -> Any:
        """A wire that was opened with `key`, has all its peers and is still open; else None.

        It stays open for as long as a buffer uses it or what is returned here lives.
        """
        return self._module.find_wire(key)

    def wire_id(self, wire: Any) -> int:
        """The number of a wire, the same in all processes."""
        return int(self._module.wire_id(wire))

    def open_wire(
        self,
        wire_id: int,
        key: str,
        process: int,
        num_processes: int,
        library: str,
        link_timeout_s: float,
        settings: dict[str, str],
    ) -> Any:
        """Makes this process's end of a wire over UCX, to be found by `key`.

        Args:
          wire_id: the same in all processes, and no other wire's.
          key: what a buffer has to have in common with others that use the wire.
          process: this process's number among those that the wire connects.
          num_processes: that the wire connects.
          library: the path of UCX's.
          link_timeout_s: seconds without an answer after which a host is lost.
          settings: variables of UCX without UCX_; those of the environment go before them.
        """
        return self._module.open_wire(
            wire_id,
            key,
            process,
            num_processes,
            library,
            link_timeout_s,
            list(settings.items()),
        )

    def open_ucx_buffer(
        self,
        buffer_id: int,
        name: str,
        config: Config,
        places: list[tuple[int, int, int] | None],
        process: int,
        num_processes: int,
        process_of_rank: list[list[int]],
        wire: Any,
    ) -> None:
        """Makes this process's part of a buffer over several; places: of its own devices."""
        sizes = config.sizes()
        self._module.open_ucx_buffer(
            buffer_id, name, sizes, places, process, num_processes, process_of_rank, wire
        )

    def open_nvshmem_buffer(
        self,
        buffer_id: int,
        name: str,
        config: Config,
        places: list[tuple[int, int, int] | None],
        process: int,
        process_of_rank: list[int],
        library: str,
        exchange: Callable[[bytes], list[bytes]],
        warn: Callable[[str], None],
    ) -> None:
        """Makes this process's part of a buffer over several. Collective.

        Args:
          buffer_id: the same in all processes.
          name: by which programs find it; the same in all processes.
          config: the sizes.
          places: as for `open_buffer`, of this process's device alone.
          process: this process's number among those that open the buffer.
          process_of_rank: for each rank of this process's group, the number of its process.
          library: the path of NVSHMEM's.
          exchange: gives bytes to all processes and returns those of all, by number.
          warn: gets the text of what works, but slowly.
        """
        self._module.open_nvshmem_buffer(
            buffer_id,
            name,
            config.sizes(),
            places,
            process,
            process_of_rank,
            library,
            exchange,
            warn,
        )

    def address(self, buffer_id: int) -> bytes:
        """What other processes need to connect to this one's part of the buffer."""
        return bytes(self._module.address(buffer_id))

    def connect(
        self, buffer_id: int, addresses: list[bytes], patience_s: float
    ) -> list[tuple[int, str]]:
        """Connects to the other processes' parts, and waits until each has been heard of.

        Args:
          buffer_id: of a buffer of several processes.
          addresses: of all parts, by process.
          patience_s: seconds to wait at most.

        Returns:
          The processes that cannot be reached, and why.
        """
        return list(self._module.connect(buffer_id, addresses, patience_s))

    def close_buffer(self, buffer_id: int) -> None:
        """Frees a buffer; whoever waits on it ends with an error. Closing twice does nothing."""
        self._module.close_buffer(buffer_id)

    def drop_buffer(self, buffer_id: int) -> None:
        """Frees a buffer as soon as no program is left that may still run on it."""
        self._module.drop_buffer(buffer_id)

    def take_fault(self, buffer_id: int) -> str | None:
        """The first fault since the last call, if there was one."""
        fault = self._module.take_fault(buffer_id)
        return None if fault is None else str(fault)

    def message_bytes(self, buffer_id: int, device: int) -> int:
        """Bytes of messages that one rank has taken so far, in use or kept for reuse."""
        return int(self._module.message_bytes(buffer_id, device))

    def stats(self, buffer_id: int, device: int) -> dict[str, Any]:
        """What the rank of a device has counted: the fields of `RankStats`, nanoseconds as ints."""
        return dict(self._module.stats(buffer_id, device))


@functools.cache
def _load(platform: str) -> Any:
    try:
        module = importlib.import_module(f"jax_sm_free._{platform}")
        # Python's end closes what is open, so that the peers of this process hear of it.
        weakref.finalize(module, _close_all, module.close_all, os.getpid())
        return module
    except ImportError as error:
        raise NotImplementedError(
            f"expected jax_sm_free to be built for {platform} devices, got a build without: {error}"
        ) from error


def _close_all(close_all: Callable[[], None], opener: int) -> None:
    # A forked child has the module, but neither the threads nor the connections of its buffers:
    # those are its parent's, which goes on using them.
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
    """Registers handlers of platform "CUDA"; without CUDA in the build, enough to compile."""
    try:
        handlers = _load("cuda").handlers()
    except NotImplementedError:
        handlers = _load("cpu").cuda_handlers()
    for name, stages in handlers.items():
        jax.ffi.register_ffi_target(name, stages, platform="CUDA")
