"""What UCX can move between two processes, by its own ucx_perftest from the same pip package."""

from __future__ import annotations

import os
import pathlib
import subprocess
from collections.abc import Sequence
from typing import Any

from jax_sm_free.transports import ucx

_TEST = ("-t", "ucp_am_bw", "-s", str(1 << 20), "-n", "200")
_MIB = 2.0**20  # ucx_perftest calls a MiB MB


def both_ways(hosts: Sequence[Any], ports: Sequence[int]) -> float:
    """Bytes per second in each direction, both directions at once, by active messages.

    Args:
      hosts: two, each with the `prefix` of a command and an `address`.
      ports: two that are free on both.
    """
    pairs = [(hosts[0], hosts[-1]), (hosts[-1], hosts[0])]
    processes: list[subprocess.Popen] = []
    try:
        for (server, _), port in zip(pairs, ports, strict=True):
            processes.append(_start(server, "-p", str(port)))
        for process in processes:
            _wait_until_it_listens(process)
        # At once, as each direction goes faster while the other is idle.
        for (server, client), port in zip(pairs, ports, strict=True):
            processes.append(_start(client, server.address, "-p", str(port), *_TEST))
        return sum(map(_bandwidth, processes[len(pairs) :])) / len(pairs)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _wait_until_it_listens(server: subprocess.Popen) -> None:
    for line in server.stdout or ():
        if line.startswith("Waiting"):
            return
    raise RuntimeError("the server of ucx_perftest has ended")


def _bandwidth(client: subprocess.Popen) -> float:
    output = client.communicate(timeout=120)[0]
    for line in output.splitlines():
        if line.startswith("Final:"):
            return float(line.split()[6]) * _MIB
    raise RuntimeError(f"ucx_perftest printed no result: {output}")


def _start(host: Any, *words: str) -> subprocess.Popen:
    package = pathlib.Path(ucx.library()).parents[1]
    libraries = [package / "lib", package.with_name("libucx_cu13.libs")]
    env = {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
        "UCX_MODULE_DIR": str(package / "lib" / "ucx"),
        "UCX_WARN_UNUSED_ENV_VARS": "n",
    }
    return subprocess.Popen(
        [*host.prefix, "stdbuf", "-oL", str(package / "bin" / "ucx_perftest"), *words],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
