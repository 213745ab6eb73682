"""Several processes open one buffer together: they meet in jax.distributed's key-value store.

Every process of the mesh writes a value under a key of its own, reads those of all others, and
waits at a barrier whose name is the digest of all values: who passes it has read what all have.
"""

from __future__ import annotations

import collections
import hashlib
import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax
import jaxlib
from jax.sharding import Mesh

from jax_sm_free.config import Config
from jax_sm_free.version import __version__

# How long processes wait for each other at least: one may still be importing, or compiling.
MIN_TIMEOUT_S = 60.0

_VALUE, _ERROR = b"+", b"!"
_NONCE_BYTES = 16

# Openings that have ended, by the processes that took part: equal on all of them.
_num_opened: collections.Counter[tuple[int, ...]] = collections.Counter()


class Bootstrap:
    """The processes of a mesh while they open one buffer. Collective.

    All of them enter it, call the same methods in the same order, and leave it:

        with Bootstrap(mesh) as bootstrap:
            bootstrap.compare(facts)
            addresses = bootstrap.exchange(address)

    Leaving waits until all have left. Where one raises inside, all others do at their next call,
    naming it; nothing stays in the store.

    Attributes:
      processes: the process indices of the mesh's devices, ascending.
      index: this process's place among them.
    """

    def __init__(self, mesh: Mesh, timeout_s: float = MIN_TIMEOUT_S) -> None:
        """Meets nobody yet.

        Args:
          mesh: some of whose devices are of this process.
          timeout_s: seconds that one call waits for the others, at least MIN_TIMEOUT_S.

        Raises:
          ValueError: if no device of the mesh is of this process.
          RuntimeError: if `jax.distributed.initialize` has not been called.
        """
        self.processes = tuple(sorted({d.process_index for d in mesh.devices.flat}))
        if jax.process_index() not in self.processes:
            raise ValueError(
                "expected a mesh with devices of this process, which is process "
                f"{jax.process_index()}, got devices of processes {list(self.processes)}"
            )
        self.index = self.processes.index(jax.process_index())
        self._client = _client()
        self._timeout_s = max(timeout_s, MIN_TIMEOUT_S)
        names = ",".join(map(str, self.processes))
        self._prefix = f"jax_sm_free/{names}/{_num_opened[self.processes]}"
        self._round = 0
        self._met = True  # in every call so far
        self._all_know = False  # that the opening has failed

    def exchange(self, payload: bytes) -> list[bytes]:
        """Gives `payload` to all processes. Collective.

        Returns:
          The payloads of all processes, in the order of `processes`.

        Raises:
          TimeoutError: naming a process that did not come.
          RuntimeError: naming a process that failed while it opened the buffer.
        """
        return self._exchange(_VALUE, payload)

    def compare(self, facts: Mapping[str, Any]) -> None:
        """Raises unless the facts are the same in all processes. Collective.

        Args:
          facts: what has to be equal, by name; values are compared as text. All processes give the
            same names.

        Raises:
          ValueError: in all processes, naming two of them, the first fact that differs, and both
            values.
        """
        names = list(facts)
        own = "\n".join(str(facts[name]).replace("\n", " ") for name in names)
        every = [payload.decode().split("\n") for payload in self.exchange(own.encode())]
        for fact, *values in zip(names, *every, strict=True):
            for process, value in zip(self.processes, values, strict=True):
                if value != values[0]:
                    self._all_know = True
                    raise ValueError(
                        f"expected all processes to open the same buffer, got {fact} {values[0]} "
                        f"in process {self.processes[0]} and {value} in process {process}"
                    )

    def __enter__(self) -> Bootstrap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.exchange(b"")
            elif self._met and not self._all_know:
                self._tell(error)
        finally:
            if self._met:
                _num_opened[self.processes] += 1

    def _tell(self, error: BaseException) -> None:
        try:
            self._exchange(_ERROR, f"{type(error).__name__}: {error}".encode())
        except TimeoutError as late:
            error.add_note(f"and the other processes could not be told: {late}")
        except RuntimeError:
            pass  # this one's own text, read back

    def _exchange(self, kind: bytes, payload: bytes) -> list[bytes]:
        deadline = time.monotonic() + self._timeout_s
        prefix = f"{self._prefix}/{self._round}"
        self._round += 1
        own_key = f"{prefix}/{self.index}"
        # What an earlier opening may have left, where not all processes came, is overwritten.
        value = kind + os.urandom(_NONCE_BYTES) + payload
        self._client.key_value_set_bytes(own_key, value, allow_overwrite=True)
        try:
            values = [
                self._get(f"{prefix}/{index}", process, deadline)
                for index, process in enumerate(self.processes)
            ]
            self._meet(f"{prefix}/{hashlib.sha256(b''.join(values)).hexdigest()}", deadline)
        except TimeoutError:
            self._met = False
            raise
        finally:
            self._client.key_value_delete(own_key)
        payloads = [value[1 + _NONCE_BYTES :] for value in values]
        for process, value, text in zip(self.processes, values, payloads, strict=True):
            if value[:1] == _ERROR:
                self._all_know = True
                raise RuntimeError(
                    f"expected all processes {list(self.processes)} to open the buffer, but "
                    f"process {process} could not: {text.decode()}"
                )
        return payloads

    def _get(self, key: str, process: int, deadline: float) -> bytes:
        try:
            return self._client.blocking_key_value_get_bytes(key, _milliseconds(deadline))
        except jax.errors.JaxRuntimeError as error:
            raise self._late(f"process {process} did not", error) from error

    def _meet(self, name: str, deadline: float) -> None:
        try:
            self._client.wait_at_barrier(name, _milliseconds(deadline), list(self.processes))
        except jax.errors.JaxRuntimeError as error:
            raise self._late("not all of them did", error) from error

    def _late(self, seen: str, error: Exception) -> TimeoutError:
        return TimeoutError(
            f"expected processes {list(self.processes)} to open the same buffer within "
            f"{self._timeout_s:g} s, but {seen}: {error}"
        )


def facts_of(
    mesh: Mesh, axes: tuple[str, ...], config: Config, transport: str, description: str
) -> dict[str, Any]:
    """What all processes have to agree on, by name, for `Bootstrap.compare`."""
    return {
        "jax_sm_free": __version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "transport": transport,
        "axes": axes,
        "mesh axes": dict(mesh.shape),
        "mesh devices": [device.id for device in mesh.devices.flat],
        **vars(config),
        "description": description,
    }


def _client() -> Any:
    # jax.distributed has no public way to its key-value store.
    from jax._src import distributed

    client = distributed.global_state.client
    if client is None:
        raise RuntimeError(
            "expected jax.distributed.initialize to have been called before a buffer is opened by "
            "several processes, but it was not"
        )
    return client


def _milliseconds(deadline: float) -> int:
    return max(1, round((deadline - time.monotonic()) * 1000))
