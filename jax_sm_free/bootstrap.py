"""Several processes open one buffer together: they meet in jax.distributed's key-value store.

Every process of the mesh writes a value under a key of its own and reads the values of all others.
It then waits at a barrier whose name is the digest of all values. So a process that passes the
barrier knows that all processes have read the same values.
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

# Processes wait for each other for at least so long: one may still import modules, or compile.
MIN_TIMEOUT_S = 60.0

_VALUE, _ERROR = b"+", b"!"
_NONCE_BYTES = 16

# How many openings have ended, by the processes that took part. All of these count the same number.
_num_opened: collections.Counter[tuple[int, ...]] = collections.Counter()


class Bootstrap:
    """The processes of a mesh while they open one buffer. Collective.

    All of them enter it, call the same methods in the same order, and leave it:

        with Bootstrap(mesh) as bootstrap:
            bootstrap.compare(facts)
            addresses = bootstrap.exchange(address)

    Leaving waits until all have left. Where one process raises inside, all others raise at their
    next call, with its number in the text. Nothing stays in the store.

    Attributes:
      processes: the process indices of the mesh's devices, ascending.
      index: this process's place among them.
    """

    def __init__(self, mesh: Mesh, timeout_s: float = MIN_TIMEOUT_S) -> None:
        """Finds the processes, and exchanges nothing yet.

        Args:
          mesh: a mesh with devices of this process.
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
        self._met = True  # whether the processes have met in every call so far
        self._all_know = False  # whether all processes know that the opening has failed

    def exchange(self, payload: bytes) -> list[bytes]:
        """Gives `payload` to all processes. Collective.

        Returns:
          The payloads of all processes, in the order of `processes`.

        Raises:
          TimeoutError: if a process did not come, with its number in the text.
          RuntimeError: if a process failed while it opened the buffer, with its number and error.
        """
        return self._exchange(_VALUE, payload)

    def compare(self, facts: Mapping[str, Any]) -> None:
        """Raises unless the facts are the same in all processes. Collective.

        Args:
          facts: the values that have to be equal, by name. They are compared as text. All
            processes give the same names.

        Raises:
          ValueError: in all processes, if a fact differs. The text has the first such fact, two
            processes, and the values of both.
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
            pass  # It is the text that this process has just written.

    def _exchange(self, kind: bytes, payload: bytes) -> list[bytes]:
        deadline = time.monotonic() + self._timeout_s
        prefix = f"{self._prefix}/{self._round}"
        self._round += 1
        own_key = f"{prefix}/{self.index}"
        # An earlier opening, to which not all processes came, may have left a value here.
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
    """The facts that all processes have to agree on, by name, for `Bootstrap.compare`."""
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
