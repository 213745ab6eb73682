"""The processes of `jax.distributed`: joining them, and gathering what all of them found."""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any

import jax

from jax_sm_free.doctor.findings import Finding, as_json, from_json, problem

# Variables of the environment. JAX itself reads the first one, and has none for the others.
ADDRESS, NUM_PROCESSES, PROCESS_ID = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)
_PREFIX = "jax_sm_free.doctor"
_LEAVE_MS = 5000


def connect(
    address: str | None,
    num_processes: int | None,
    process_id: int | None,
    cluster: bool,
    timeout_s: float,
) -> None:
    """Joins the other processes, if there are any.

    There are none if the arguments are None, the environment has no such variables, and `cluster`
    is false.

    Args:
      address: host:port of process 0; None to read it from the environment.
      num_processes: None to read it from the environment.
      process_id: None to read it from the environment.
      cluster: whether JAX shall ask Slurm, Open MPI or Kubernetes for all three.
      timeout_s: seconds to wait for the others. After that JAX ends this process.

    Raises:
      ValueError: if some of the three are known, but not all.
    """
    # A peer that has ended must not keep the others from ending.
    patience: dict[str, Any] = {
        "initialization_timeout": round(timeout_s),
        "shutdown_timeout_seconds": 10,
    }
    if cluster:
        jax.distributed.initialize(**patience)
        return
    place = {
        ADDRESS: address,
        NUM_PROCESSES: num_processes,
        PROCESS_ID: process_id,
    }
    found = {name: os.environ.get(name) if v is None else v for name, v in place.items()}
    missing = [name for name, value in found.items() if value is None]
    if len(missing) == len(place):
        return
    if missing:
        raise ValueError(
            f"expected all of {', '.join(place)} by flag or in the environment, or none of them, "
            f"got none of {', '.join(missing)}"
        )
    jax.distributed.initialize(
        str(found[ADDRESS]), int(found[NUM_PROCESSES] or 0), int(found[PROCESS_ID] or 0), **patience
    )


def gather(findings: list[Finding], timeout_s: float) -> list[list[Finding]]:
    """Gives all processes the findings of all processes, by process. Collective.

    If a process does not report within `timeout_s` seconds, that is the only finding of it.
    """
    client = _client()
    if client is None:
        return [findings]
    deadline = time.monotonic() + timeout_s
    own = json.dumps(as_json(findings))
    client.key_value_set(f"{_PREFIX}/{jax.process_index()}", own, allow_overwrite=True)
    every = []
    for process in range(jax.process_count()):
        left_ms = max(1, round(1000 * (deadline - time.monotonic())))
        try:
            found = client.blocking_key_value_get(f"{_PREFIX}/{process}", left_ms)
            every.append(from_json(json.loads(found)))
        except jax.errors.JaxRuntimeError as error:
            silent = problem(f"process {process} did not report within {timeout_s:g} s: {error}")
            every.append([silent])
    # The store ends with process 0, so that all processes leave together.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.wait_at_barrier(_PREFIX, _LEAVE_MS)
    return every


def is_first() -> bool:
    """Whether this is process 0. It starts no backend of JAX, because a backend may hang."""
    from jax._src import distributed

    return int(distributed.global_state.process_id) == 0


def _client() -> Any:
    # jax.distributed has no public way to its key-value store. The store works where nothing else
    # does.
    from jax._src import distributed

    return distributed.global_state.client
