"""`Lifetime`: a buffer from its opening to its end, with all that is not an op."""

from __future__ import annotations

import os
import weakref
from types import TracebackType
from typing import Any, Self

import jax
from jax.sharding import Mesh

from jax_sm_free import stats, transports
from jax_sm_free.native import Native
from jax_sm_free.stats import BufferStats
from jax_sm_free.transports import Opened


class FaultError(RuntimeError):
    """An exchange went wrong. The text has rank, peer and op, and what was expected and seen."""


class Lifetime:
    """A buffer of the extension that is open, or has been closed."""

    mesh: Mesh

    def __init__(self, opened: Opened) -> None:
        self._native, self._id = opened.native, opened.buffer_id
        self._opener = os.getpid()
        self._closer = weakref.finalize(self, _drop, self._native, self._id, self._opener)
        self._closer.atexit = False  # `native` closes what is open when Python ends.

    @property
    def is_closed(self) -> bool:
        """Whether the buffer has been closed, so that its ops raise."""
        return not self._closer.alive

    def check(self) -> None:
        """Raises the fault that the buffer has met, if there was one. Not collective.

        Wait for the results of a program first: the check itself waits for nothing.

        On CPU it raises the first fault since the last check. JAX has raised the same fault where
        the program's results were needed: as `jax.errors.JaxRuntimeError`, or as ValueError if the
        process has one device. Catch both, and call this. On GPUs the first fault stays. Results
        that it reached are NaN, and every later check and call raises it.

        Raises:
          FaultError: for a fault of any kind.
          RuntimeError: if the buffer is closed.
        """
        self._check_open("check")
        if self._native is None:
            return
        fault = self._native.take_fault(self._id)
        if fault is not None:
            raise FaultError(fault)

    def close(self) -> None:
        """Frees the buffer's memory. Not collective; closing twice does nothing.

        A recv that still waits ends with an error, and so does a program that runs this buffer's
        ops later. A buffer that is garbage collected without having been closed ends no program:
        see "Lifetime" in docs/faults.md. In a forked child, closing does nothing, because the
        memory and the connections belong to the parent process.
        """
        if self._closer.detach() and self._native is not None and os.getpid() == self._opener:
            self._native.close_buffer(self._id)

    def __enter__(self) -> Self:
        self._check_open("with")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def message_bytes(self, device: Any) -> int:
        """Bytes that messages have taken so far on `device`. Not collective.

        Compare them with `estimate_memory(config).messages`, and on GPUs with the sum of `messages`
        and `stage`. A device outside the mesh has 0 bytes, and so have devices that are only
        described.

        Args:
          device: a `jax.Device` of this process.

        Raises:
          TypeError: if `device` is no `jax.Device`.
          RuntimeError: if the buffer is closed.
        """
        self._check_open("message_bytes")
        if not isinstance(device, jax.Device):
            raise TypeError(f"message_bytes: expected a jax.Device, got {device!r}")
        if self._native is None:
            return 0
        return self._native.message_bytes(self._id, transports.ordinal(device))

    def stats(self) -> BufferStats:
        """A snapshot of what the ranks of this process have exchanged so far. Not collective.

        The counts begin where the buffer opens: subtract two snapshots. Taking one waits for no
        result and for no kernel, so that exchanges that are on their way are counted in part. Wait
        for the results of a program first to have all of its exchanges. On GPUs a snapshot copies a
        few hundred bytes from each device.

        Returns:
          `BufferStats`, without ranks if the devices are only described.

        Raises:
          RuntimeError: if the buffer is closed, or a device cannot be read.
        """
        self._check_open("stats")
        if self._native is None:
            return BufferStats(())
        return stats.read(self._native, self._id, self.mesh)

    def __copy__(self) -> Self:
        """The same buffer, so that the copy of a module uses the buffer of the module."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def _check_open(self, op: str) -> None:
        if self.is_closed:
            raise RuntimeError(f"{op}: expected an open buffer, got one that is closed")


def _drop(native: Native | None, buffer_id: int, opener: int) -> None:
    if native is not None and os.getpid() == opener:
        native.drop_buffer(buffer_id)
