"""Software, devices and memory of this process."""

from __future__ import annotations

import importlib
import os
import platform
import socket
from collections.abc import Iterator

import jax
import jaxlib

from jax_sm_free.config import Config
from jax_sm_free.doctor.cuda_driver import Driver
from jax_sm_free.doctor.findings import Finding, note, ok, problem
from jax_sm_free.memory import estimate_memory
from jax_sm_free.version import __version__

_GIB = 2**30
# The share of a GPU's memory that XLA takes if the environment does not set it.
_POOL = 0.75


def check_software() -> Iterator[Finding]:
    """The versions of the software, and whether the extension for this platform loads."""
    yield ok(
        f"Python {platform.python_version()}, jax {jax.__version__}, "
        f"jaxlib {jaxlib.version.__version__}, jax_sm_free {__version__}"
    )
    extension = {"cpu": "_cpu", "gpu": "_cuda"}.get(jax.default_backend())
    if extension is None:
        yield problem(f"expected CPU devices or GPUs, got platform {jax.default_backend()!r}")
        return
    try:
        importlib.import_module(f"jax_sm_free.{extension}")
    except ImportError as error:
        yield problem(f"this build has no working jax_sm_free.{extension}: {error}")


def check_devices() -> Iterator[Finding]:
    """The number and the kind of the devices."""
    local = jax.local_devices()
    kinds = ", ".join(sorted({device.device_kind for device in local}))
    text = f"{len(local)} {local[0].platform} device(s) ({kinds}) on {socket.gethostname()}"
    if jax.process_count() > 1:
        text += f"; {jax.device_count()} of {jax.process_count()} processes"
    yield ok(text)


def check_peer_access() -> Iterator[Finding]:
    """Which GPU reaches the memory of which other one."""
    if jax.default_backend() != "gpu":
        yield ok("CPU devices of one process share its memory")
        return
    driver = Driver()
    reaches = driver.peer_access()
    yield note(f"CUDA driver {driver.version}; GPU (row) reaches GPU (column)\n{_matrix(reaches)}")
    own = [device.local_hardware_id for device in jax.local_devices()]
    cut_off = [f"{a} to {b}" for a in own for b in own if not reaches[a][b]]
    if cut_off:
        yield problem(
            f"no peer access from GPU {', '.join(cut_off)}: transport 'cuda_peer' needs it"
        )


def _matrix(reaches: list[list[bool]]) -> str:
    numbers = range(len(reaches))
    rows = [f"{'':4}" + "".join(f"{b:4}" for b in numbers)]
    for a in numbers:
        cells = ["-" if a == b else "yes" if reaches[a][b] else "no" for b in numbers]
        rows.append(f"{a:4}" + "".join(f"{cell:>4}" for cell in cells))
    return "\n".join(rows)


def check_memory(config: Config) -> Iterator[Finding]:
    """Whether there is the memory that a buffer of `config` needs."""
    need = estimate_memory(config)
    outside = need.messages + need.stage
    nodes = f" on {config.num_nodes} nodes" if config.num_nodes > 1 else ""
    yield note(
        f"a rank of {config.ep_size}{nodes} needs {outside / _GIB:.2f} GiB for messages outside "
        f"XLA's memory,\nand {need.recv / _GIB:.2f} GiB within for what one dispatch returns "
        f"(recv_capacity {config.recv_capacity})"
    )
    if jax.default_backend() == "gpu":
        yield from _check_gpu_memory(outside, need.recv)
        return
    available, ranks = _available_bytes(), len(jax.local_devices())
    text = f"{available / _GIB:.1f} GiB available for {ranks} rank(s) of this process"
    if ranks * need.total <= available:
        yield ok(text)
    else:
        needed = f"{ranks * need.total / _GIB:.1f} GiB are needed at these sizes"
        yield problem(f"{text}: too little,\n{needed}; --max_tokens, --hidden and others set them")


def _check_gpu_memory(outside: int, inside: int) -> Iterator[Finding]:
    driver, share = Driver(), _pool_share()
    for device in jax.local_devices():
        total = driver.total_bytes(device.local_hardware_id)
        text = (
            f"{device.device_kind}: {total / _GIB:.1f} GiB, of which XLA may take {share:.0%} "
            "(XLA_PYTHON_CLIENT_MEM_FRACTION)"
        )
        fits = outside <= (1 - share) * total and inside <= share * total
        yield ok(text) if fits else problem(f"{text}: too little for messages or results")


def _pool_share() -> float:
    return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", _POOL))


def _available_bytes() -> int:
    """The system's own estimate of the memory that new programs can have."""
    with open("/proc/meminfo") as lines:
        for line in lines:
            name, value = line.split(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    raise OSError("/proc/meminfo has no line MemAvailable")
