"""Says within a minute whether a machine or a cluster is ready, and if not, why.

    python -m jax_sm_free.doctor                        # all devices of this process
    python -m jax_sm_free.doctor --hidden=4096 --num_experts=64 --max_tokens=2048
    python -m jax_sm_free.doctor --coordinator_address=host0:1234 --num_processes=2 --process_id=0
    srun -N2 python -m jax_sm_free.doctor --cluster     # places from Slurm

With several processes, each process examines its own devices, all of them run the same ops
together, and process 0 prints the findings of all. The exit status of every process is 0 if none of
them has a problem, and 1 if one of them has.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pathlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

# The doctor needs little memory of a GPU, which other programs may use.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
from absl import app, flags, logging

from jax_sm_free.bounds import DTYPES
from jax_sm_free.config import Config
from jax_sm_free.doctor import bandwidth, exchange, libraries, machine, network, processes
from jax_sm_free.doctor.findings import (
    Examination,
    Finding,
    as_json,
    has_problem,
    ok,
    problem,
    report,
)

_ADDRESS = flags.DEFINE_string("coordinator_address", None, "host:port of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the cluster.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this process.", lower_bound=0)
_CLUSTER = flags.DEFINE_boolean("cluster", False, "Ask Slurm, Open MPI or Kubernetes for these.")
# The flags that are arguments of `Config`, under its names.
_SIZES = (
    flags.DEFINE_integer("hidden", 7168, "Columns of a row."),
    flags.DEFINE_integer("num_experts", 256, "Experts of all ranks."),
    flags.DEFINE_integer("top_k", 8, "Experts of a token."),
    flags.DEFINE_integer("max_tokens", 4096, "Tokens of a rank and call."),
    flags.DEFINE_integer("recv_capacity", None, "Expert rows of a rank; none: worst case."),
    flags.DEFINE_float("capacity_factor", None, "The same over a balanced load's rows."),
    flags.DEFINE_integer("num_nodes", 1, "Nodes of two tiers; 1: one tier."),
    flags.DEFINE_integer("num_slots", 2, "Exchanges in flight."),
    flags.DEFINE_integer("expert_alignment", 1, "Rows that groups are padded to."),
    flags.DEFINE_integer("expert_capacity", None, "Rows of each group."),
    flags.DEFINE_enum("dtype", "bfloat16", list(DTYPES), "Of rows."),
    flags.DEFINE_string("wire_dtype", None, "What rows travel as, for example float8_e4m3fn."),
)
_PROBE_MIB = flags.DEFINE_integer("probe_mib", 0, "For bandwidths; 0: by platform.")
_TIMEOUT_S = flags.DEFINE_float("timeout_s", 60.0, "Then what is not done yet is a problem.")
_JSON = flags.DEFINE_string("json", None, "A file that process 0 writes the findings to.")

# Seconds that a process waits for the others beyond the time that they have.
_GATHER_S = 10.0
_MEETING = "processes"
_DEFAULT_PROBE_MIB = {"cpu": 32, "gpu": 512}


def _config() -> Config:
    sizes: dict[str, Any] = {flag.name: flag.value for flag in _SIZES}
    return Config(ep_size=jax.device_count(), **sizes)


def _check_bandwidth() -> Iterator[Finding]:
    if jax.default_backend() == "cpu":
        copy = bandwidth.measure_host(_probe_bytes())
        yield ok(f"a thread copies {copy / 1e9:.1f} GB/s, read and written")
        return
    found = bandwidth.measure(jax.local_devices(), _probe_bytes())
    text = f"local copy {found.local / 1e9:.1f} GB/s, read and written"
    if found.link is not None:
        text += f"; {found.link / 1e9:.1f} GB/s leave each device, all of this process at once"
    yield ok(text)


def _probe_bytes() -> int:
    return (_PROBE_MIB.value or _DEFAULT_PROBE_MIB[jax.default_backend()]) << 20


def _examine(examination: Examination) -> None:
    """Runs all checks, first those that need no other process."""
    # A receive that reports a fault says more than a check that ran out of time.
    patience_s = _TIMEOUT_S.value / 3
    examination.run("software", machine.check_software)
    examination.run("devices", machine.check_devices)
    examination.run("peer access", machine.check_peer_access)
    examination.run("NVSHMEM", libraries.check_nvshmem)
    examination.run("UCX", libraries.check_ucx)
    examination.run("network", network.check_nics)
    examination.run("memory", network.check_shared_memory)
    examination.run("memory", lambda: machine.check_memory(_config()))
    examination.run("bandwidth", _check_bandwidth)
    examination.run("self-test", lambda: exchange.check_against_reference(_config(), patience_s))
    examination.run(
        "exchange", lambda: exchange.check_exchange(_config(), _probe_bytes(), patience_s)
    )


def _conclude(examination: Examination, deadline: float) -> int:
    """Prints what all processes found; returns the exit status."""
    left_s = max(0.0, deadline - time.monotonic())
    every = processes.gather(list(examination.findings), left_s + _GATHER_S)
    status = int(any(map(has_problem, every)))
    if processes.is_first():
        print(report(every), flush=True)
        if _JSON.value:
            found = {"ready": not status, "processes": [as_json(findings) for findings in every]}
            pathlib.Path(_JSON.value).write_text(json.dumps(found, indent=1) + "\n")
    return status


def _give_up(examination: Examination) -> None:
    """Ends the process if a check hangs, because a check cannot be interrupted."""
    if examination.running == _MEETING:
        told = f"not all of them met within {_TIMEOUT_S.value:g} s: was each one started, and does "
        examination.add(_MEETING, problem(f"{told}\nprocess 0 listen where they look for it?"))
        print(report([examination.findings]), flush=True)
        os._exit(1)
    faulthandler.dump_traceback()
    late = problem(f"not done within {_TIMEOUT_S.value:g} s; the stacks are on stderr")
    examination.add(examination.running, late)
    os._exit(_conclude(examination, time.monotonic()))


def main(argv: Sequence[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    examination = Examination()
    deadline = time.monotonic() + _TIMEOUT_S.value
    timer = threading.Timer(_TIMEOUT_S.value, _give_up, [examination])
    timer.daemon = True
    timer.start()
    examination.running = _MEETING
    place = (_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    try:
        processes.connect(*place, _CLUSTER.value, _TIMEOUT_S.value + _GATHER_S)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    _examine(examination)
    timer.cancel()
    status = _conclude(examination, deadline)
    if status and jax.process_count() > 1:
        os._exit(status)  # JAX's shutdown would wait for a process that has ended.
    return status


if __name__ == "__main__":
    app.run(main)
